"""`kfdist doctor` as users see it: a verdict, a line for each check, and an exit code."""

import json

from typer.testing import CliRunner

from kfdist.cli.main import app
from kfdist.doctor.finding import Verdict, failed, ok, warning, worst

RUN = CliRunner()


def test_the_worst_decides() -> None:
    findings = [ok("a", ""), warning("b", "", "do"), failed("c", "", "do")]
    assert [worst(findings[:count]) for count in range(4)] == [Verdict.OK, Verdict.OK, Verdict.WARNING, Verdict.FAILED]


def test_the_command_says_how_to_mend_and_fails(tmp_path) -> None:
    given = ["doctor", "--set", f'security.certificates="{tmp_path / "none"}"', "--set", "run.dir='/proc/none'"]
    shown = RUN.invoke(app, given)
    assert shown.exit_code == 1
    assert max(map(len, shown.output.splitlines())) <= 80
    told = json.loads(RUN.invoke(app, [*given, "--json"]).output)
    wrong = {each["check"] for each in told["findings"] if each["verdict"] == "failed"}
    assert wrong == {
        "run directory",
        "disk",  # of /proc there is none
        "token",
        *(f"certificate of {role}" for role in ("controller", "owner", "client")),
    }
    assert all(each["mend"] for each in told["findings"] if each["verdict"] != "ok")
    assert told["verdict"] == "failed"


def test_warnings_alone_end_with_zero() -> None:
    done = RUN.invoke(app, ["doctor", "--json"])
    assert (done.exit_code, json.loads(done.output)["verdict"] in ("ok", "warning")) == (0, True), done.output

"""What `kfdist submit` says when it is interrupted."""

import pytest
from typer.testing import CliRunner

from kfdist.cli import main
from kfdist.errors import ExitCode
from kfdist.launch.submission import submit


@pytest.mark.parametrize(
    ("given", "again"), [([], "the same command with --follow"), (["--follow"], "the same command")]
)
def test_an_interrupted_submission_says_how_to_see_the_job(
    given: list[str], again: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(submit, "submit", interrupted)
    done = CliRunner().invoke(main.app, ["submit", *given])
    assert done.exit_code == ExitCode.INTERRUPTED
    assert f"a job that was submitted goes on; {again} shows its log" in done.output

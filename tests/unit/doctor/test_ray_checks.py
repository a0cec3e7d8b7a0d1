"""Ray: an address where nobody is, and tokens that are missing, doubtful or readable for others."""

import socket
from pathlib import Path

import pytest

from kfdist.config import load_config
from kfdist.doctor.finding import Verdict
from kfdist.doctor.ray_checks import check_authentication, check_ray


def _checks(ray: str, environment: dict[str, str]) -> dict[str, Verdict]:
    config = load_config(None, environment={}, overrides=[f'cluster.ray="{ray}"'])
    return {each.check: each.verdict for each in check_ray(config, environment)}


def test_a_ray_of_the_runs_own_needs_nothing() -> None:
    assert _checks("local", {"RAY_AUTH_MODE": "nonsense"}) == {"ray authentication": Verdict.OK}
    alone = load_config(None, environment={}, overrides=['preconditioner.method="none"'])
    assert [each.seen for each in check_ray(alone, {})] == ["this run needs none"]


def test_nobody_where_ray_should_be() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert _checks(address, {"RAY_AUTH_MODE": "disabled"})["ray"] is Verdict.FAILED
        assert _checks("auto", {"RAY_ADDRESS": address})["ray"] is Verdict.FAILED
        taken.listen()
        assert _checks(address, {"RAY_AUTH_MODE": "disabled"}) == {"ray": Verdict.OK, "ray authentication": Verdict.OK}
    assert _checks("auto", {})["ray"] is Verdict.OK


@pytest.mark.parametrize(
    ("given", "verdict", "words"),
    [
        ({}, Verdict.WARNING, "RAY_AUTH_MODE isn't set"),
        ({"RAY_AUTH_MODE": "tokens"}, Verdict.FAILED, "'tokens'"),
        ({"RAY_AUTH_MODE": "token"}, Verdict.FAILED, "there is none"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": " "}, Verdict.FAILED, "RAY_AUTH_TOKEN is empty"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "/none"}, Verdict.FAILED, "/none can't be read"),
        ({"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "abc"}, Verdict.WARNING, "although there is a token"),
        ({"RAY_AUTH_TOKEN": "abc"}, Verdict.OK, "in RAY_AUTH_TOKEN"),
    ],
)
def test_how_this_process_would_show_itself(given: dict, verdict: Verdict, words: str, tmp_path: Path) -> None:
    found = check_authentication({"HOME": str(tmp_path), **given})
    assert (found.verdict, words in found.seen) == (verdict, True), found
    assert bool(found.mend) == (verdict is not Verdict.OK)


def test_a_token_that_others_may_read(tmp_path: Path) -> None:
    path = tmp_path / ".ray" / "auth_token"
    path.parent.mkdir()
    path.write_text("0123456789abcdef")
    path.chmod(0o644)
    environment = {"HOME": str(tmp_path)}
    assert check_authentication(environment).mend == f"chmod 600 {path}"
    path.chmod(0o600)
    assert check_authentication(environment).verdict is Verdict.OK

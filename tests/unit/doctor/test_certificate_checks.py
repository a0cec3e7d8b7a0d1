"""Certificates: missing, expired, about to, another role's, not a pair, another authority's, readable for others."""

import datetime
import shutil
from pathlib import Path

import pytest

from kfdist.config import Config, load_config
from kfdist.doctor.certificate_checks import check_certificates
from kfdist.doctor.finding import Finding, Verdict
from kfdist.rpc.certificates import Authority, make_certificates
from kfdist.system.credentials import Role


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    make_certificates(tmp_path / "certificates")
    return tmp_path / "certificates"


def _config(directory: Path) -> Config:
    return load_config(None, environment={}, overrides=[f'security.certificates="{directory}"'])


def _found(directory: Path) -> dict[str, Finding]:
    return {finding.check: finding for finding in check_certificates(_config(directory))}


def _issued(directory: Path, role: Role, days: float) -> bytes:
    return Authority.read(directory).issue(role, valid=datetime.timedelta(days=days))


def test_new_ones_are_right_and_none_are_needed_on_loopback(directory: Path) -> None:
    found = _found(directory)
    assert list(found) == [*(f"certificate of {role}" for role in Role), "token"]
    assert {finding.verdict for finding in found.values()} == {Verdict.OK}
    assert [each.verdict for each in check_certificates(load_config(None, environment={}))] == [Verdict.OK]


def test_missing(directory: Path) -> None:
    (directory / "owner.pem").unlink()
    found = _found(directory)["certificate of owner"]
    assert found.verdict is Verdict.FAILED
    assert "owner.pem" in found.seen and "kfdist certs init" in found.mend
    assert {each.verdict for each in check_certificates(_config(directory / "none"))} == {Verdict.FAILED}


@pytest.mark.parametrize(
    ("role", "days", "verdict", "words"),
    [
        (Role.CLIENT, -1, Verdict.FAILED, "expired on"),
        (Role.CLIENT, 10, Verdict.WARNING, "9 days"),
        (Role.OWNER, 300, Verdict.FAILED, "is for owner.kfdist, not for client.kfdist"),
    ],
)
def test_expired_or_of_another_role(directory: Path, role: Role, days: float, verdict: Verdict, words: str) -> None:
    (directory / "client.pem").write_bytes(_issued(directory, role, days))
    found = _found(directory)["certificate of client"]
    assert (found.verdict, words in found.seen) == (verdict, True), found
    assert found.mend


def test_a_key_and_a_certificate_that_are_no_pair(directory: Path) -> None:
    key, _, _ = (directory / "owner.pem").read_bytes().partition(b"-----BEGIN CERTIFICATE")
    _, _, certificate = (directory / "client.pem").read_bytes().partition(b"-----BEGIN CERTIFICATE")
    (directory / "client.pem").write_bytes(key + b"-----BEGIN CERTIFICATE" + certificate)
    assert _found(directory)["certificate of client"].verdict is Verdict.FAILED


def test_another_authority(directory: Path, tmp_path: Path) -> None:
    make_certificates(tmp_path / "others")
    shutil.copy(tmp_path / "others" / "ca.pem", directory / "ca.pem")
    found = _found(directory)["certificate of controller"]
    assert found.verdict is Verdict.FAILED
    assert "isn't signed by" in found.seen


def test_what_others_may_read(directory: Path) -> None:
    (directory / "client.pem").chmod(0o644)
    (directory / "token").chmod(0o640)
    found = _found(directory)
    wrong = {check: each.mend for check, each in found.items() if each.verdict is Verdict.FAILED}
    assert wrong == {
        "certificate of client": f"chmod 600 {directory / 'client.pem'}",
        "token": f"chmod 600 {directory / 'token'}",
    }


def test_a_token_that_is_none(directory: Path) -> None:
    (directory / "token").write_text("short\n")
    assert _found(directory)["token"].verdict is Verdict.FAILED

"""Credentials are places of files: read where they are used, read again when they change, and never shown."""

import os
import pickle
import shutil
import ssl
from pathlib import Path

import pytest

from kfdist.errors import EnvironmentFault
from kfdist.links.socket_messages import CourierSetup
from kfdist.owner.owner import OwnerOptions
from kfdist.system.credentials import Credentials, Reread, Role
from tests.support.jobs import context
from tests.support.secrets import secrets_of


def of(role: Role, directory: Path | str, token_file: str | None = None) -> Credentials:
    made = Credentials.at(role, str(directory), token_file)
    assert made is not None
    return made


def test_nothing_named_is_no_credentials_and_the_token_lies_beside_the_certificates(certificates: Path):
    assert Credentials.at(Role.CLIENT, None, None) is None
    credentials = of(Role.OWNER, os.path.relpath(certificates))
    assert credentials.certificates == str(certificates)  # a courier or an owner may work in another directory
    assert credentials.token_file == str(certificates / "token")
    assert credentials.token() == (certificates / "token").read_text().strip()


def test_the_home_is_that_of_whoever_reads(certificates: Path, monkeypatch: pytest.MonkeyPatch):
    credentials = of(Role.CLIENT, f"~/{certificates.name}")
    assert credentials.certificates == f"~/{certificates.name}"
    monkeypatch.setenv("HOME", str(certificates.parent))
    assert credentials.identity_files[0] == certificates / "client.pem"


def test_nothing_secret_is_in_their_text(certificates: Path):
    credentials = of(Role.OWNER, certificates)
    shown = repr(credentials) + repr(credentials.identity())
    assert credentials.token() not in shown and "PRIVATE" not in shown
    # As owners get them through Ray, and couriers from their ranks.
    passed = pickle.dumps(OwnerOptions(owner_id="o", credentials=credentials))
    assert str(certificates).encode() in passed
    told = CourierSetup(address="127.0.0.1:1", rank_pid=1, context=context(), credentials=credentials).write()
    passed += os.pread(told, 1 << 20, 0)
    os.close(told)
    assert not any(secret in passed for secret in secrets_of(certificates))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("client.pem", None, "can't be read .No such file"),
        ("ca.pem", None, "can't be read .No such file"),
        ("client.pem", "nothing", "holds no private key with its certificate"),
        ("ca.pem", "nothing", "holds no certificate"),
        ("token", None, "can't be read .No such file"),
        ("token", "short", "holds 5 characters that make no token"),
        ("token", "sixteen or more of them", "holds 23 characters"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_its_node(
    certificates: Path, tmp_path: Path, name: str, content: str | None, words: str
):
    broken = tmp_path / "broken"
    shutil.copytree(certificates, broken)
    (broken / name).unlink()
    if content is not None:
        (broken / name).write_text(content)
    credentials = of(Role.CLIENT, broken)
    with pytest.raises(EnvironmentFault, match=words) as caught:
        credentials.identity()
        credentials.token()
    assert f"{broken / name} on node {os.uname().nodename} " in str(caught.value)
    assert "kfdist certs init" in str(caught.value)
    assert content is None or content not in str(caught.value)


def test_a_certificate_of_another_key_is_no_identity(certificates: Path, tmp_path: Path):
    mixed = tmp_path / "mixed"
    shutil.copytree(certificates, mixed)
    key = (certificates / "owner.pem").read_text().partition("-----BEGIN CERTIFICATE")[0]
    certificate = "-----BEGIN CERTIFICATE" + (certificates / "client.pem").read_text().partition("-----BEGIN CERT")[2]
    (mixed / "client.pem").write_text(key + certificate.replace("CERTIFICATEIFICATE", "CERTIFICATE"))
    with pytest.raises(EnvironmentFault, match="client.pem.*KEY_VALUES_MISMATCH"):
        of(Role.CLIENT, mixed).tls(ssl.PROTOCOL_TLS_CLIENT)


def test_changed_files_are_read_again_and_broken_ones_are_not_taken_up(tmp_path: Path, caplog):
    file = tmp_path / "token"
    file.write_text("a" * 16)
    credentials = of(Role.CLIENT, tmp_path)
    token = Reread([file], credentials.token)
    first = token.value
    assert token.value is first
    file.write_text("b" * 17)
    assert token.value == "b" * 17
    file.unlink()
    assert token.value == token.value == "b" * 17
    assert caplog.text.count("what was read before stays in force") == 1
    file.write_text("c" * 18)
    assert token.value == "c" * 18

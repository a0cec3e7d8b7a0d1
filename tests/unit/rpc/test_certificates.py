"""`kfdist certs`: what it makes, for whom, and for how long."""

import datetime
import json
import shutil
import stat
from pathlib import Path

import pytest
from cryptography import x509

from kfdist.cli.main import app
from kfdist.errors import ConfigError, EnvironmentFault
from kfdist.rpc.certificates import Authority, certificate_fault, check_credentials, make_certificates
from kfdist.system.credentials import Credentials, Role


def kfdist(*arguments: str) -> None:
    app(list(arguments), standalone_mode=False)


def names(file: Path) -> list[str]:
    certificate = x509.load_pem_x509_certificate(file.read_bytes())
    found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [*found.get_values_for_type(x509.DNSName), *map(str, found.get_values_for_type(x509.IPAddress))]


def test_one_command_makes_them_and_only_their_owner_reads_what_is_secret(tmp_path: Path, capsys):
    directory = tmp_path / "certs"
    kfdist("certs", "init", str(directory), "--hosts", "10.0.0.5, node1.example.org,::1", "--days", "30", "--json")
    assert json.loads(capsys.readouterr().out) == {"directory": str(directory)}
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in directory.iterdir()}
    assert modes.pop("ca.pem") & 0o400
    assert modes == dict.fromkeys(["ca.key", "controller.pem", "owner.pem", "client.pem", "token"], 0o600)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert names(directory / "controller.pem") == ["controller.kfdist", "node1.example.org", "10.0.0.5", "::1"]
    assert names(directory / "client.pem") == ["client.kfdist"]
    ends = x509.load_pem_x509_certificate((directory / "owner.pem").read_bytes()).not_valid_after_utc
    assert abs(ends - datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=30)) < datetime.timedelta(minutes=5)


def test_what_is_there_is_kept_until_it_is_renewed(certificates: Path, tmp_path: Path, capsys):
    directory = tmp_path / "certs"
    shutil.copytree(certificates, directory)
    before = {file.name: file.read_bytes() for file in directory.iterdir()}
    with pytest.raises(ConfigError, match="ca.key, ca.pem, token, .*kfdist certs renew"):
        kfdist("certs", "init", str(directory))
    kfdist("certs", "renew", str(directory))
    assert "renewed" in capsys.readouterr().out
    changed = {file.name for file in directory.iterdir() if file.read_bytes() != before[file.name]}
    assert changed == {"controller.pem", "owner.pem", "client.pem"}
    assert names(directory / "owner.pem") == ["owner.kfdist", "localhost", "127.0.0.1"]
    assert (directory / "owner.pem").stat().st_mode & 0o077 == 0


def test_renewing_needs_the_authority(certificates: Path, tmp_path: Path):
    with pytest.raises(EnvironmentFault, match=r"ca\.key can't be read .*where `kfdist certs init` made"):
        kfdist("certs", "renew", str(tmp_path))
    (tmp_path / "ca.key").write_text("nothing")
    shutil.copy(certificates / "ca.pem", tmp_path)
    with pytest.raises(EnvironmentFault, match="aren't what `kfdist certs init` wrote"):
        kfdist("certs", "renew", str(tmp_path))


@pytest.mark.parametrize("host", ["a b", "exa_mple", "http://x", "10.0.0.1/8"])
def test_a_host_is_a_name_or_an_address(tmp_path: Path, host: str):
    with pytest.raises(ConfigError, match="--hosts: .*neither an address nor a host's name"):
        make_certificates(tmp_path / "certs", hosts=[host])
    assert not list((tmp_path / "certs").iterdir())


def test_a_place_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFault, match="can't be written"):
        make_certificates(tmp_path / "file" / "certs")


@pytest.mark.parametrize(
    ("days", "words"), [(-1, "expired on .* `kfdist certs renew`"), (0, ""), (None, "isn't signed by .*ca.pem")]
)
def test_what_is_wrong_with_ones_own_certificate_is_said(
    certificates: Path, tmp_path: Path, days: int | None, words: str
):
    directory = tmp_path / "certs"
    shutil.copytree(certificates, directory)
    authority = Authority.new() if days is None else Authority.read(directory)
    pem = authority.issue(Role.OWNER, valid=datetime.timedelta(days=days or 0, hours=1))
    (directory / "owner.pem").write_bytes(pem)
    credentials = Credentials.at(Role.OWNER, str(directory), None)
    assert credentials is not None
    if not words:
        check_credentials(credentials)
        return
    assert certificate_fault(credentials)
    with pytest.raises(EnvironmentFault, match=words):
        check_credentials(credentials)

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
from kfdist.rpc.certificate_faults import certificate_fault, check_credentials
from kfdist.rpc.certificates import Authority, make_certificates, renew_certificates
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


NO_HOSTS = ["a b", "exa_mple", "http://x", "10.0.0.1/8", "10.0.0.256", "node-", "a" * 64, "a." * 127 + "a"]


@pytest.mark.parametrize("host", NO_HOSTS)
def test_a_host_is_a_name_or_an_address(tmp_path: Path, host: str):
    with pytest.raises(ConfigError, match="--hosts: .*neither an address nor a host's name"):
        make_certificates(tmp_path / "certs", hosts=[host])
    assert not (tmp_path / "certs").exists()


@pytest.mark.parametrize("host", ["owner.kfdist", "Controller.kfdist", "client.kfdist", "*.kfdist"])
def test_no_host_makes_one_role_another(tmp_path: Path, host: str):
    with pytest.raises(ConfigError, match="--hosts: .*what certificates call a role"):
        make_certificates(tmp_path / "certs", hosts=[host])


def test_renewing_uses_the_authority_whose_key_it_has_while_two_are_trusted(certificates: Path, tmp_path: Path):
    directory = shutil.copytree(certificates, tmp_path / "certs")
    make_certificates(tmp_path / "old")
    (directory / "ca.pem").write_bytes(
        b"".join(Path(each, "ca.pem").read_bytes() for each in (tmp_path / "old", directory))
    )
    renew_certificates(directory)
    shutil.copy(certificates / "ca.pem", directory)
    check_credentials(credentials_of(Role.CONTROLLER, directory))


def test_nothing_holds_longer_than_its_authority(tmp_path: Path):
    authority = Authority.new(days=20)
    certificate = x509.load_pem_x509_certificate(authority.issue(Role.OWNER, valid=datetime.timedelta(days=30)))
    assert certificate.not_valid_after_utc == authority.ends


def test_an_authority_that_has_expired_renews_nothing_and_is_named(
    certificates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    directory = shutil.copytree(certificates, tmp_path / "certs")
    expired = Authority.new(days=-1)
    expired.write(directory)
    with pytest.raises(EnvironmentFault, match=r"the authority in .*ca\.pem expired on .* `kfdist certs init`"):
        renew_certificates(directory)
    tomorrow = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=1)
    monkeypatch.setattr(Authority, "ends", tomorrow)  # as those do it who sign for longer than they may
    (directory / "owner.pem").write_bytes(expired.issue(Role.OWNER, valid=datetime.timedelta(days=1)))
    assert "the authority in " in certificate_fault(credentials_of(Role.OWNER, directory))


def test_renewing_needs_to_know_the_hosts(certificates: Path, tmp_path: Path):
    directory = shutil.copytree(certificates, tmp_path / "certs")
    (directory / "controller.pem").write_text("nothing")
    with pytest.raises(EnvironmentFault, match=r"controller\.pem isn't what `kfdist certs init` wrote"):
        renew_certificates(directory)


def test_a_certificate_of_another_role_is_no_server(certificates: Path, tmp_path: Path):
    directory = shutil.copytree(certificates, tmp_path / "certs")
    shutil.copy(directory / "client.pem", directory / "controller.pem")
    with pytest.raises(EnvironmentFault, match=r"controller\.pem is for client\.kfdist, not for controller\.kfdist"):
        check_credentials(credentials_of(Role.CONTROLLER, directory))


def test_what_others_may_read_is_warned_of(certificates: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    directory = shutil.copytree(certificates, tmp_path / "certs")
    check_credentials(credentials_of(Role.OWNER, directory))
    assert not caplog.text
    (directory / "owner.pem").chmod(0o640)
    (directory / "token").chmod(0o604)
    check_credentials(credentials_of(Role.OWNER, directory))
    for name in ("owner.pem", "token"):
        assert f"may read {directory / name}; `chmod 600` it" in caplog.text


def credentials_of(role: Role, directory: Path) -> Credentials:
    credentials = Credentials.at(role, str(directory), None)
    assert credentials is not None
    return credentials


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
    credentials = credentials_of(Role.OWNER, directory)
    if not words:
        check_credentials(credentials)
        return
    assert certificate_fault(credentials)
    with pytest.raises(EnvironmentFault, match=words):
        check_credentials(credentials)

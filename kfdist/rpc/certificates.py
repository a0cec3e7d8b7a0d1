"""Certificates: made for a whole installation at once, renewed from the same authority, and looked at when refused."""

import datetime
import ipaddress
import secrets
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from kfdist.errors import ConfigError, EnvironmentFault
from kfdist.system.credentials import AUTHORITY_FILE, TOKEN_FILE, Credentials, Reread, Role
from kfdist.system.files import replace_file

AUTHORITY_KEY_FILE = "ca.key"
AUTHORITY_DAYS = 3650
DAYS = 365

_CLOCKS_DIFFER = datetime.timedelta(hours=1)
"""Certificates hold from an hour ago, for nodes whose clocks are behind."""

_SERVERS = (Role.CONTROLLER, Role.OWNER)


class Authority:
    """A certificate authority: signs certificates for roles."""

    def __init__(self, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
        """Takes over an authority's key and certificate."""
        self._key = key
        self._certificate = certificate

    @classmethod
    def new(cls, *, days: int = AUTHORITY_DAYS) -> "Authority":
        """Makes an authority with a new key."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"kfdist {secrets.token_hex(4)}")])
        builder = _builder(name, name, key.public_key(), datetime.timedelta(days=days))
        usage = x509.KeyUsage(
            digital_signature=False,
            content_commitment=False,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            key_cert_sign=True,
            crl_sign=True,
            encipher_only=False,
            decipher_only=False,
        )
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        return cls(key, builder.add_extension(usage, critical=True).sign(key, hashes.SHA256()))

    @classmethod
    def read(cls, directory: Path) -> "Authority":
        """Reads an authority that `write` wrote.

        Raises:
            EnvironmentFault: Its files aren't there, or aren't an authority's.
        """
        try:
            key = serialization.load_pem_private_key((directory / AUTHORITY_KEY_FILE).read_bytes(), password=None)
            certificate = x509.load_pem_x509_certificate((directory / AUTHORITY_FILE).read_bytes())
        except OSError as error:
            raise EnvironmentFault(
                f"{error.filename} can't be read ({error.strerror}); renew where `kfdist certs init` made the "
                "certificates, or make new ones in another directory and copy them to all nodes"
            ) from None
        except (ValueError, TypeError):
            key, certificate = None, None
        if certificate is None or not isinstance(key, ec.EllipticCurvePrivateKey):
            raise EnvironmentFault(
                f"{AUTHORITY_KEY_FILE} and {AUTHORITY_FILE} in {directory} aren't what `kfdist certs init` wrote; "
                "restore them, or make new ones in another directory"
            )
        return cls(key, certificate)

    def write(self, directory: Path) -> None:
        """Writes key and certificate; the key for its owner's eyes only."""
        replace_file(directory / AUTHORITY_KEY_FILE, _pem(self._key), private=True)
        replace_file(directory / AUTHORITY_FILE, self._certificate.public_bytes(serialization.Encoding.PEM))

    def issue(self, role: Role, *, hosts: Sequence[str] = (), valid: datetime.timedelta) -> bytes:
        """Returns a new private key and its certificate, as PEM.

        Args:
            role: Who shows it; servers also call others.
            hosts: Names and addresses that a server's certificate holds for, beside its role.
            valid: For how long from now; negative for one that has expired.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, role.host_name)])
        names: list[x509.GeneralName] = [x509.DNSName(role.host_name)]
        uses = [ExtendedKeyUsageOID.CLIENT_AUTH]
        if role in _SERVERS:
            names += [_general_name(host) for host in hosts]
            uses.append(ExtendedKeyUsageOID.SERVER_AUTH)
        builder = _builder(name, self._certificate.subject, key.public_key(), valid)
        for extension, critical in (
            (x509.BasicConstraints(ca=False, path_length=None), True),
            (x509.SubjectAlternativeName(names), False),
            (x509.ExtendedKeyUsage(uses), False),
            (x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), False),
        ):
            builder = builder.add_extension(extension, critical=critical)
        certificate = builder.sign(self._key, hashes.SHA256())
        # In one file, so that a renewal replaces both at once.
        return _pem(key) + certificate.public_bytes(serialization.Encoding.PEM)


def make_certificates(directory: Path, *, hosts: Sequence[str] = (), days: int = DAYS) -> None:
    """Makes an authority, a certificate for each role, and a token.

    Args:
        directory: Where; made if need be.
        hosts: Names and addresses of servers, for clients that check those rather than roles.
        days: How long the certificates hold; the authority holds ten years.

    Raises:
        ConfigError: There are certificates already, or a host is neither a name nor an address.
        EnvironmentFault: The directory can't be written.
    """
    files = (AUTHORITY_KEY_FILE, AUTHORITY_FILE, TOKEN_FILE, *(role.file_name for role in Role))
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if there := [name for name in files if (directory / name).exists()]:
            raise ConfigError(
                f"{directory} holds {', '.join(there)} already, which others may rely on; choose another directory, or "
                "`kfdist certs renew` for new certificates of the same authority"
            )
        authority = Authority.new(days=max(days, AUTHORITY_DAYS))
        issued = {role: authority.issue(role, hosts=hosts, valid=datetime.timedelta(days=days)) for role in Role}
        authority.write(directory)
        for role, pem in issued.items():
            replace_file(directory / role.file_name, pem, private=True)
        replace_file(directory / TOKEN_FILE, f"{secrets.token_urlsafe(32)}\n".encode(), private=True)
    except OSError as error:
        raise EnvironmentFault(f"{directory} can't be written ({error.strerror}); choose another directory") from None


def renew_certificates(directory: Path, *, days: int = DAYS) -> None:
    """Makes new certificates of the same authority and for the same hosts; authority and token stay.

    Raises:
        EnvironmentFault: The directory isn't one that `make_certificates` wrote, or can't be written.
    """
    authority = Authority.read(directory)
    try:
        old = x509.load_pem_x509_certificate((directory / Role.CONTROLLER.file_name).read_bytes())
        for role in Role:
            pem = authority.issue(role, hosts=_hosts(old), valid=datetime.timedelta(days=days))
            replace_file(directory / role.file_name, pem, private=True)
    except OSError as error:
        raise EnvironmentFault(f"{error.filename or directory} can't be renewed ({error.strerror})") from None


def certificate_fault(credentials: Credentials) -> str:
    """Says what is wrong with this process's own certificate, so that others refuse it; empty if nothing is.

    Raises:
        EnvironmentFault: The files can't be read.
    """
    identity, now = credentials.identity(), datetime.datetime.now(datetime.UTC)
    chain = x509.load_pem_x509_certificates(identity.own)
    path, authority_path = credentials.identity_files
    begins, ends = chain[0].not_valid_before_utc, chain[0].not_valid_after_utc
    if ends < now:
        return f"{path} expired on {ends:%Y-%m-%d %H:%M} UTC; `kfdist certs renew` makes a new one"
    if begins > now:
        return f"{path} holds only from {begins:%Y-%m-%d %H:%M} UTC; set this node's clock right"
    if not any(_signed(chain[-1], by=each) for each in x509.load_pem_x509_certificates(identity.authority)):
        return f"{path} isn't signed by {authority_path}; copy both from the same `kfdist certs init`"
    return ""


def watched_expiries(credentials: Credentials) -> Callable[[], Mapping[str, float]]:
    """Returns a function that says when this process's certificate and its authority's expire, as they are then.

    By the file's name, in seconds since 1970. Files that can't be read any more leave the last answer in force.
    """
    files = credentials.identity_files

    def read() -> Mapping[str, float]:
        identity = credentials.identity()
        held = {files[0].name: identity.own, files[1].name: identity.authority}
        return {
            name: min(each.not_valid_after_utc.timestamp() for each in x509.load_pem_x509_certificates(pem))
            for name, pem in held.items()
        }

    reread = Reread(files, read)
    return lambda: reread.value


def check_credentials(credentials: Credentials) -> None:
    """Checks that a process can use its credentials.

    Raises:
        EnvironmentFault: A file is missing or unusable, or the certificate has expired; says what to do.
    """
    if fault := certificate_fault(credentials):
        raise EnvironmentFault(f"{fault} (node {socket.gethostname()})")
    credentials.token()


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, valid: datetime.timedelta
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
    builder = builder.serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(min(now, now + valid) - _CLOCKS_DIFFER).not_valid_after(now + valid)
    return builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)


def _signed(certificate: x509.Certificate, *, by: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(by)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    labels = host.removeprefix("*.").split(".")
    if not all(label.replace("-", "").isalnum() and label.isascii() for label in labels):
        raise ConfigError(
            f"{host!r} is neither an address nor a host's name; write such as 10.0.0.5 or node1.example.org",
            path="--hosts",
        )
    return x509.DNSName(host)


def _hosts(certificate: x509.Certificate) -> list[str]:
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    found = [*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))]
    return [name for name in found if name != Role.CONTROLLER.host_name]


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )

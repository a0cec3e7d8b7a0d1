"""Certificates: made for a whole installation at once, and renewed from the same authority."""

import datetime
import ipaddress
import re
import secrets
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from kfdist.errors import ConfigError, EnvironmentFault
from kfdist.system.credentials import AUTHORITY_FILE, TOKEN_FILE, Role
from kfdist.system.files import replace_file

AUTHORITY_KEY_FILE = "ca.key"
AUTHORITY_DAYS = 3650
DAYS = 365

_CLOCKS_DIFFER = datetime.timedelta(hours=1)
"""Certificates hold from an hour ago, for nodes whose clocks are behind."""

_SERVERS = (Role.CONTROLLER, Role.OWNER)

_LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?")
_LONGEST_HOST = 253
_NAMES_OF_ROLES = {"*.kfdist", *(role.host_name for role in Role)}


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
            trusted = x509.load_pem_x509_certificates((directory / AUTHORITY_FILE).read_bytes())
            # While authorities change, both the old and the new one are trusted.
            certificate = next((each for each in trusted if each.public_key() == key.public_key()), None)
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

    @property
    def ends(self) -> datetime.datetime:
        """Until when it holds; what it signs holds no longer."""
        return self._certificate.not_valid_after_utc

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
        builder = _builder(name, self._certificate.subject, key.public_key(), valid, most=self.ends)
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
    authority = Authority.new(days=max(days, AUTHORITY_DAYS))
    issued = {role: authority.issue(role, hosts=hosts, valid=datetime.timedelta(days=days)) for role in Role}
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if there := [name for name in files if (directory / name).exists()]:
            raise ConfigError(
                f"{directory} holds {', '.join(there)} already, which others may rely on; choose another directory, or "
                "`kfdist certs renew` for new certificates of the same authority"
            )
        authority.write(directory)
        for role, pem in issued.items():
            replace_file(directory / role.file_name, pem, private=True)
        replace_file(directory / TOKEN_FILE, f"{secrets.token_urlsafe(32)}\n".encode(), private=True)
    except OSError as error:
        raise EnvironmentFault(f"{directory} can't be written ({error.strerror}); choose another directory") from None


def renew_certificates(directory: Path, *, days: int = DAYS) -> None:
    """Makes new certificates of the same authority and for the same hosts; authority and token stay.

    Raises:
        EnvironmentFault: The directory isn't one that `make_certificates` wrote, can't be written, or its authority has
            expired.
    """
    authority = Authority.read(directory)
    if authority.ends < datetime.datetime.now(datetime.UTC):
        raise EnvironmentFault(
            f"the authority in {directory / AUTHORITY_FILE} expired on {authority.ends:%Y-%m-%d}; make new "
            "certificates with `kfdist certs init` in another directory, for all nodes"
        )
    try:
        old = x509.load_pem_x509_certificate((directory / Role.CONTROLLER.file_name).read_bytes())
        for role in Role:
            pem = authority.issue(role, hosts=_hosts(old), valid=datetime.timedelta(days=days))
            replace_file(directory / role.file_name, pem, private=True)
    except OSError as error:
        raise EnvironmentFault(f"{error.filename or directory} can't be renewed ({error.strerror})") from None
    except (ValueError, x509.ExtensionNotFound):
        raise EnvironmentFault(
            f"{directory / Role.CONTROLLER.file_name} isn't what `kfdist certs init` wrote, so that nobody knows its "
            "--hosts; restore it, or make new certificates in another directory"
        ) from None


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    valid: datetime.timedelta,
    *,
    most: datetime.datetime | None = None,
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
    builder = builder.serial_number(x509.random_serial_number())
    ends = now + valid if most is None else min(now + valid, most)
    builder = builder.not_valid_before(min(now, ends) - _CLOCKS_DIFFER).not_valid_after(ends)
    return builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    labels = host.removeprefix("*.").split(".")
    if len(host) > _LONGEST_HOST or labels[-1].isdigit() or not all(_LABEL.fullmatch(label) for label in labels):
        raise ConfigError(
            f"{host!r} is neither an address nor a host's name; write such as 10.0.0.5 or node1.example.org",
            path="--hosts",
        )
    if host.lower() in _NAMES_OF_ROLES:
        raise ConfigError(
            f"{host!r} is what certificates call a role; no server may have another's, so name hosts otherwise",
            path="--hosts",
        )
    return x509.DNSName(host)


def _hosts(certificate: x509.Certificate) -> list[str]:
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    found = [*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))]
    return [name for name in found if name not in _NAMES_OF_ROLES]


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )

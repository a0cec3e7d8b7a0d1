"""Whether the certificates are there, hold, are whose they should be, and are kept from others."""

import datetime

from cryptography import x509

from kfdist.config import Config
from kfdist.doctor.finding import Finding, divided, failed, ok, warning
from kfdist.errors import EnvironmentFault
from kfdist.rpc.certificate_faults import certificate_fault
from kfdist.system.credentials import Credentials, Role
from kfdist.system.files import from_home, is_private

SOON = datetime.timedelta(days=30)
"""What expires within this is warned of."""

_COPY = "copy it again from where `kfdist certs init` made it"


def check_certificates(config: Config) -> list[Finding]:
    """Checks what every role would show, as far as this node has it, and the token."""
    directory = config.security.certificates
    if directory is None:
        return [ok("certificates", "none are configured: everything stays on loopback")]
    findings = [_of_role(config, role) for role in Role]
    credentials = config.security.credentials(Role.CLIENT)
    assert credentials is not None
    return [*findings, check_token(credentials)]


def _of_role(config: Config, role: Role) -> Finding:
    credentials = config.security.credentials(role)
    assert credentials is not None
    return check_certificate(credentials)


def check_certificate(credentials: Credentials) -> Finding:
    """Checks one role's key, certificate and authority."""
    check, (own, _) = f"certificate of {credentials.role}", credentials.identity_files
    try:
        if fault := certificate_fault(credentials):  # also that key and certificate are a pair, and can be read
            return failed(check, *divided(fault))
    except EnvironmentFault as fault:
        seen, mend = divided(fault)
        return failed(check, seen, mend or _COPY)
    certificate = x509.load_pem_x509_certificate(own.read_bytes())
    if not is_private(own):
        return failed(check, f"{own} holds a private key, and others may read it", f"chmod 600 {own}")
    left = certificate.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
    seen = f"{own} holds until {certificate.not_valid_after_utc:%Y-%m-%d}"
    if left < SOON:
        mend = f"`kfdist certs renew {own.parent}`, and copy it to the nodes; no process needs a restart"
        return warning(check, f"{seen}, {left.days} days", mend)
    return ok(check, seen)


def check_token(credentials: Credentials) -> Finding:
    """Checks the token's file."""
    path = from_home(credentials.token_file)
    try:
        credentials.token()
    except EnvironmentFault as fault:
        seen, mend = divided(fault)
        return failed("token", seen, mend or _COPY)
    if not is_private(path):
        return failed("token", f"others may read {path}", f"chmod 600 {path}")
    return ok("token", f"{path} is there, for this user alone")

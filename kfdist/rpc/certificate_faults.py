"""What of a process's own certificate makes others refuse it, and when it expires.

Most processes have none: the library that reads it takes a while to import, and is imported where one is read.
"""

import datetime
import logging
import socket
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from kfdist.errors import EnvironmentFault
from kfdist.system.credentials import Credentials, Reread
from kfdist.system.files import is_private
from kfdist.types import MetricSample

if TYPE_CHECKING:
    from cryptography import x509

_LOG = logging.getLogger(__name__)


def certificate_fault(credentials: Credentials) -> str:
    """Says what is wrong with this process's own certificate, so that others refuse it; empty if nothing is.

    Raises:
        EnvironmentFault: The files can't be read.
    """
    from cryptography import x509

    identity, now = credentials.identity(), datetime.datetime.now(datetime.UTC)
    chain = x509.load_pem_x509_certificates(identity.own)
    path, authority_path = credentials.identity_files
    begins, ends = chain[0].not_valid_before_utc, chain[0].not_valid_after_utc
    if ends < now:
        return f"{path} expired on {ends:%Y-%m-%d %H:%M} UTC; `kfdist certs renew` makes a new one"
    if begins > now:
        return f"{path} holds only from {begins:%Y-%m-%d %H:%M} UTC; set this node's clock right"
    authorities = x509.load_pem_x509_certificates(identity.authority)
    if not (signers := [each for each in authorities if _signed(chain[-1], by=each)]):
        return f"{path} isn't signed by {authority_path}; copy both from the same `kfdist certs init`"
    if (ends := max(each.not_valid_after_utc for each in signers)) < now:
        return (
            f"the authority in {authority_path} expired on {ends:%Y-%m-%d %H:%M} UTC; make new certificates with "
            "`kfdist certs init`, for all nodes"
        )
    if (wanted := credentials.role.host_name) not in (names := _names(chain[0])):
        return (
            f"{path} is for {', '.join(names) or 'nobody'}, not for {wanted}; copy it again from where "
            "`kfdist certs init` made it"
        )
    return ""


def expiry_samples(credentials: Credentials | None, process: str) -> Callable[[], Sequence[MetricSample]]:
    """Returns a function that says when this process's certificate and its authority's expire, as they are then.

    Files that can't be read any more leave the last answer in force. Without credentials there is nothing to say.

    Args:
        credentials: This process's.
        process: The kind of process that it is, for the label `process`.

    Raises:
        EnvironmentFault: The files can't be read.
    """
    if credentials is None:
        return list
    files = credentials.identity_files

    def read() -> Sequence[MetricSample]:
        from cryptography import x509

        identity = credentials.identity()
        held = {files[0].name: identity.own, files[1].name: identity.authority}
        return [
            MetricSample(
                name="kfdist_certificate_expiry_timestamp_seconds",
                value=min(each.not_valid_after_utc.timestamp() for each in x509.load_pem_x509_certificates(pem)),
                labels={"process": process, "file": name},
            )
            for name, pem in held.items()
        ]

    reread = Reread(files, read)
    return lambda: reread.value


def check_credentials(credentials: Credentials) -> None:
    """Checks that a process can use its credentials.

    What others may read is only warned of: in a container, nobody else is there.

    Raises:
        EnvironmentFault: A file is missing or unusable, or the certificate has expired; says what to do.
    """
    if fault := certificate_fault(credentials):
        raise EnvironmentFault(f"{fault} (node {socket.gethostname()})")
    credentials.token()
    own, _, token = credentials.files
    for path in (own, token):
        if not is_private(path):
            _LOG.warning("other users of node %s may read %s; `chmod 600` it", socket.gethostname(), path)


def _names(certificate: "x509.Certificate") -> list[str]:
    from cryptography import x509

    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return []
    return extension.value.get_values_for_type(x509.DNSName)


def _signed(certificate: "x509.Certificate", *, by: "x509.Certificate") -> bool:
    from cryptography.exceptions import InvalidSignature

    try:
        certificate.verify_directly_issued_by(by)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True

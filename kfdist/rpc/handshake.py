"""Why a server takes no connection: gRPC says UNAVAILABLE for all reasons, a bare TLS handshake tells which it is."""

import socket
import ssl

from kfdist.errors import EnvironmentFault
from kfdist.system.addresses import split_address
from kfdist.system.credentials import Credentials, Role

SECONDS = 2.0

_EXPIRED, _NAME_DIFFERS, _NOT_YET_VALID = 10, 62, 9
"""Of X.509 verification (openssl's x509_vfy.h)."""


def explain(address: str, credentials: Credentials | None, *, server: Role, seconds: float = SECONDS) -> str:
    """Says why a server that is there takes no connection from this process.

    Args:
        address: Where it listens, "host:port".
        credentials: What this process shows; None if it has nothing to show.
        server: What should listen there.
        seconds: How long to wait for it, twice at most.

    Returns:
        A sentence without its full stop; empty if nobody is there, or nothing is wrong with TLS.
    """
    try:
        return _explain(address, credentials, server, seconds)
    except EnvironmentFault as fault:  # of the own files
        return str(fault)


def _explain(address: str, credentials: Credentials | None, server: Role, seconds: float) -> str:
    context = _curious() if credentials is None else credentials.tls(ssl.PROTOCOL_TLS_CLIENT)
    context.set_alpn_protocols(["h2"])
    answered = False
    try:
        with socket.create_connection(split_address(address), timeout=seconds) as plain:
            with context.wrap_socket(plain, server_hostname=server.host_name) as secured:
                answered = True
                # In TLS 1.3 a client learns only afterwards whether its certificate was taken: then gRPC speaks first.
                taken = bool(secured.recv(1))
    except ssl.SSLCertVerificationError as error:
        return _fault_of_server(error, address, server)
    except ssl.SSLError as error:
        answered = answered or "ALERT" in (error.reason or "")
        taken = False
    except OSError:
        return ""
    if credentials is None:
        return _WANTED.format(server=server, address=address) if answered and not taken else ""
    if not answered:
        return f"the {server} at {address} doesn't speak TLS: it was started without security.certificates"
    if taken:
        return ""
    from kfdist.rpc.certificates import certificate_fault  # its library takes a while to import

    return (
        certificate_fault(credentials)
        or f"the {server} at {address} refuses the certificate {_own(credentials)}: it "
        "trusts another authority; give both sides certificates of one `kfdist certs init`"
    )


def token_refused(address: str, server: str) -> str:
    """Says what to do where a server refuses the token; it says no more than that."""
    return (
        f"the {server} at {address} refuses the token: give both sides the same one, in `token` beside the "
        "certificates or as security.token_file (KFDIST_SECURITY__TOKEN_FILE)"
    )


_WANTED = (
    "the {server} at {address} takes nothing without TLS and a token: name the directory with its certificates in "
    "security.certificates (KFDIST_SECURITY__CERTIFICATES)"
)


def _curious() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _fault_of_server(error: ssl.SSLCertVerificationError, address: str, server: Role) -> str:
    where = f"the certificate of the {server} at {address}"
    match error.verify_code:
        case code if code == _EXPIRED:
            return f"{where} has expired; `kfdist certs renew` makes a new one, which it takes up without a restart"
        case code if code == _NOT_YET_VALID:
            return f"{where} isn't valid yet; set the clocks of both nodes right"
        case code if code == _NAME_DIFFERS:
            return f"{where} isn't for {server.host_name}, but for another role; is the address right?"
        case _:
            return (
                f"{where} is of another authority ({error.verify_message}); give both sides certificates of one "
                "`kfdist certs init`"
            )


def _own(credentials: Credentials) -> str:
    return str(credentials.identity_files[0])

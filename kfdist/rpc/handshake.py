"""Why a server takes no connection: gRPC says UNAVAILABLE for all reasons, a bare TLS handshake tells which it is."""

import socket
import ssl
import time

from kfdist.errors import EnvironmentFault
from kfdist.rpc.certificate_faults import certificate_fault
from kfdist.system.addresses import split_address
from kfdist.system.credentials import Credentials, Role

SECONDS = 2.0
_AGAIN_SECONDS = 1.0


def explain(address: str, credentials: Credentials | None, *, server: Role, seconds: float = SECONDS) -> str:
    """Says why a server that is there takes no connection from this process.

    Args:
        address: Where it listens, "host:port".
        credentials: What this process shows; None if it has nothing to show.
        server: What should listen there.
        seconds: How long to wait for it, twice at most; and as long again if it closes the connection at once.

    Returns:
        A sentence without its full stop; empty if nobody is there, or nothing is wrong with TLS.
    """
    try:
        reason = _explain(address, credentials, server, seconds)
        if credentials is not None and reason == _closed(address, server):  # as one does that is being restarted
            time.sleep(_AGAIN_SECONDS)
            reason = _explain(address, credentials, server, seconds)
        return reason
    except EnvironmentFault as fault:  # of the own files
        return str(fault)


def token_refused(address: str, server: str) -> str:
    """Says what to do where a server refuses the token; it says no more than that."""
    return (
        f"the {server} at {address} refuses the token: give both sides the same one, in `token` beside the "
        "certificates or as security.token_file (KFDIST_SECURITY__TOKEN_FILE)"
    )


def _explain(address: str, credentials: Credentials | None, server: Role, seconds: float) -> str:
    context = _curious() if credentials is None else credentials.tls(ssl.PROTOCOL_TLS_CLIENT)
    context.set_alpn_protocols(["h2"])
    speaks_tls = taken = False
    closed = _closed(address, server) if credentials is not None else ""
    try:
        with socket.create_connection(split_address(address), timeout=seconds) as plain:
            with context.wrap_socket(plain, server_hostname=server.host_name) as secured:
                speaks_tls = True
                # In TLS 1.3 a client learns only afterwards whether its certificate was taken: then gRPC speaks first.
                taken = bool(secured.recv(1))
    except ssl.SSLCertVerificationError as error:
        return _fault_of_server(error, f"the certificate of the {server} at {address}", server)
    except TimeoutError:
        return ""
    except ssl.SSLEOFError:
        if not speaks_tls:
            return closed
    except ssl.SSLError as error:
        speaks_tls = speaks_tls or "ALERT" in (error.reason or "")
    except ConnectionResetError:
        if not speaks_tls:
            return closed
    except OSError:
        if not speaks_tls:
            return ""
    if taken:
        return ""
    if credentials is None:
        wanted = (
            f"the {server} at {address} takes nothing without TLS and a token: name the directory with its "
            "certificates in security.certificates (KFDIST_SECURITY__CERTIFICATES)"
        )
        return wanted if speaks_tls else ""
    if not speaks_tls:
        return f"the {server} at {address} doesn't speak TLS: it was started without security.certificates"
    return certificate_fault(credentials) or (
        f"the {server} at {address} refuses the certificate {credentials.identity_files[0]}: it trusts another "
        "authority; give both sides certificates of one `kfdist certs init`"
    )


def _closed(address: str, server: Role) -> str:
    return (
        f"what listens at {address} closes connections at once: it has as many as it takes, or isn't a kfdist {server}"
    )


def _curious() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _fault_of_server(error: ssl.SSLCertVerificationError, certificate: str, server: Role) -> str:
    match error.verify_code:  # openssl's x509_vfy.h
        case 9:
            return f"{certificate} isn't valid yet; set the clocks of both nodes right"
        case 10:
            return f"{certificate} has expired; `kfdist certs renew` makes a new one, which needs no restart"
        case 26 | 62:  # not for servers; not for this name
            return f"{certificate} isn't for {server.host_name}, but for another role; is the address right?"
        case _:
            return (
                f"{certificate} is of another authority ({error.verify_message}); give both sides certificates of one "
                "`kfdist certs init`"
            )

"""TLS and the token as gRPC has them: each side shows a certificate of one authority, and callers the token, too."""

import getpass
import hmac
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from typing_extensions import override

from kfdist.system.credentials import Credentials, Identity, Reread

USER_HEADER = "kfdist-user"
"""Metadata in which callers say for whom they call, such as "ada@host"."""

MOST_USER_CHARACTERS = 128

_HEADER = "authorization"
_REFUSAL = "the call carries no token, or another one than this server's"


def channel_credentials(credentials: Credentials) -> grpc.ChannelCredentials:
    """Returns what a channel shows: this process's certificate at connection, and the token at each call.

    The files are read now: whoever connects again after they have changed makes a new channel.

    Raises:
        EnvironmentFault: A file is missing or unusable.
    """
    identity = credentials.identity()
    tls = grpc.ssl_channel_credentials(identity.authority, identity.own, identity.own)
    return grpc.composite_channel_credentials(tls, grpc.access_token_call_credentials(credentials.token()))


def server_credentials(credentials: Credentials) -> grpc.ServerCredentials:
    """Returns what a server shows and demands: its certificate, and one of the same authority from every client.

    Renewed files count from the next connection on.

    Raises:
        EnvironmentFault: A file is missing or unusable.
    """
    renewed = Reread(credentials.identity_files, credentials.identity)
    in_use = renewed.value

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        nonlocal in_use
        if renewed.value is in_use:
            return None  # gRPC keeps what it has
        in_use = renewed.value
        return _configuration(in_use)

    return grpc.dynamic_ssl_server_credentials(
        _configuration(in_use),
        fetch,  # pyright: ignore[reportArgumentType] - gRPC documents None
        require_client_authentication=True,
    )


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """Refuses every call that doesn't carry the token, before anything of it is read."""

    def __init__(self, credentials: Credentials) -> None:
        """Reads the token; a changed file counts from the next call on.

        Raises:
            EnvironmentFault: There is none.
        """
        self._token = Reread(credentials.files[-1:], credentials.token)

    @override
    async def intercept_service(
        self,
        continuation: "Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]]",
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[Any, Any] | None":
        given = b""
        for key, value in handler_call_details.invocation_metadata or ():
            if key == _HEADER:
                given = value.encode() if isinstance(value, str) else value
        if hmac.compare_digest(given, f"Bearer {self._token.value}".encode()):
            return await continuation(handler_call_details)
        # Of streams, whatever the method is: a handler of one message would first wait for it.
        return grpc.stream_stream_rpc_method_handler(_refuse)


async def _refuse(requests: object, context: grpc.aio.ServicerContext) -> None:
    del requests
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, _REFUSAL)


def caller_of(context: Any) -> str:
    """Returns who makes a call: as the caller says, and as its certificate says.

    Only the certificate proves anything; the name tells colleagues from each other.
    """
    metadata = dict(context.invocation_metadata() or ())
    name = metadata.get(USER_HEADER, "")
    name = name if isinstance(name, str) and name.isprintable() else ""
    names = context.auth_context().get("x509_subject_alternative_name", [])
    roles = ", ".join(name.decode(errors="replace").removesuffix(".kfdist") for name in names)
    certificate = f" (certificate of a {roles})" if roles else ""
    return f"{name[:MOST_USER_CHARACTERS] or 'somebody'}{certificate}"


def user_metadata() -> tuple[tuple[str, str], ...]:
    """Returns what a call for a person says of who that is."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        user = str(os.getuid())
    name = f"{user}@{socket.gethostname()}"
    return ((USER_HEADER, name.encode("ascii", "replace").decode()),)


def _configuration(identity: Identity) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(identity.own, identity.own)], identity.authority)

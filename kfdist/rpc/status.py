"""gRPC statuses and kfdist's errors, in both directions, always with a message.

Servers raise; `answers` and `streams` turn what was raised into a status. Clients turn a status into the error that
says who must act (`kfdist.errors`).
"""

import asyncio
import functools
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, NoReturn, TypeVar, cast

import grpc
import grpc.aio

from kfdist.errors import ConfigError, EnvironmentFault, KfdistError
from kfdist.rpc.chunking import PayloadError, PayloadTooLarge
from kfdist.rpc.handshake import explain, token_refused
from kfdist.system.credentials import Credentials, Role

_LOG = logging.getLogger(__name__)

MAX_DETAILS_BYTES = 2048
"""Longest message of a status: it travels in HTTP/2 trailers, which peers limit to about 8 KiB."""

Unary = TypeVar("Unary", bound=Callable[..., Awaitable[Any]])
Streaming = TypeVar("Streaming", bound=Callable[..., AsyncGenerator[Any]])


class Refusal(KfdistError):
    """A call that a server refuses.

    Attributes:
        code: The gRPC status it ends with.
    """

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code


def status_of(error: Exception) -> tuple[grpc.StatusCode, str]:
    """Returns the status and the message with which a server answers an exception."""
    match error:
        case Refusal():
            return error.code, _shortened(str(error))
        case PayloadTooLarge():
            return grpc.StatusCode.RESOURCE_EXHAUSTED, _shortened(str(error))
        case PayloadError() | ConfigError():
            return grpc.StatusCode.INVALID_ARGUMENT, _shortened(str(error))
        case EnvironmentFault():
            return grpc.StatusCode.INTERNAL, _shortened(str(error))
        case _:
            return grpc.StatusCode.INTERNAL, _shortened(f"a fault in kfdist itself: {type(error).__name__}: {error}")


def answers(method: Unary) -> Unary:
    """Makes a unary method of an asyncio service end with the status of what it raises."""

    @functools.wraps(method)
    async def wrapped(self: Any, request: Any, context: Any) -> Any:
        try:
            return await method(self, request, context)
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            await _abort(context, error)

    return cast(Unary, wrapped)


def streams(method: Streaming) -> Streaming:
    """Makes a streaming method of an asyncio service end with the status of what it raises."""

    @functools.wraps(method)
    async def wrapped(self: Any, request: Any, context: Any) -> AsyncGenerator[Any]:
        try:
            # Closed by name: else a cancelled call's cleanup would wait for the garbage collector.
            async with aclosing(method(self, request, context)) as stream:
                async for answer in stream:
                    yield answer
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            await _abort(context, error)

    return cast(Streaming, wrapped)


def fault_of(
    error: grpc.RpcError, *, address: str, what: str, remedy: str = "start one, or name the right address"
) -> KfdistError:
    """Returns the error that a client raises for a status.

    Args:
        error: What gRPC raised.
        address: The address that was called.
        what: What listens there, such as "controller".
        remedy: What to do if nothing does.
    """
    code, details = code_of(error), details_of(error)
    match code:
        case (
            grpc.StatusCode.NOT_FOUND
            | grpc.StatusCode.INVALID_ARGUMENT
            | grpc.StatusCode.OUT_OF_RANGE
            | grpc.StatusCode.FAILED_PRECONDITION  # what was asked for isn't possible as things stand
        ):
            return ConfigError(details)
        case grpc.StatusCode.UNAVAILABLE:
            return EnvironmentFault(f"no {what} answers at {address}: {remedy}; gRPC says: {details}")
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return EnvironmentFault(f"the {what} at {address} didn't answer in time: is it stopped or overloaded?")
        case grpc.StatusCode.UNAUTHENTICATED:
            return EnvironmentFault(token_refused(address, what))
        case grpc.StatusCode.UNIMPLEMENTED:
            return EnvironmentFault(f"what listens at {address} isn't a kfdist {what} of this version: {details}")
        case _:
            return EnvironmentFault(f"the {what} at {address} refused ({code.name}): {details}")


async def refusal_of(
    error: grpc.aio.AioRpcError, address: str, credentials: Credentials | None, *, server: Role, answered: bool
) -> str:
    """Says why a server that is there refuses a process's calls; empty if nobody is there, or it has only gone.

    Args:
        error: What gRPC raised.
        address: Where the server listens.
        credentials: What the process shows.
        server: What the server is.
        answered: Whether it took calls on this connection before. gRPC itself ends some of those as INTERNAL when the
            server goes; a server that never took one says by that what is wrong with it, such as a full disk.
    """
    match code_of(error):
        case grpc.StatusCode.UNAVAILABLE:
            return await asyncio.to_thread(explain, address, credentials, server=server)
        case grpc.StatusCode.UNAUTHENTICATED:
            return token_refused(address, server)
        case (
            grpc.StatusCode.INVALID_ARGUMENT
            | grpc.StatusCode.FAILED_PRECONDITION
            | grpc.StatusCode.RESOURCE_EXHAUSTED
            | grpc.StatusCode.UNIMPLEMENTED
        ):
            return details_of(error)
        case grpc.StatusCode.INTERNAL if not answered:
            return details_of(error)
        case _:
            return ""


def code_of(error: grpc.RpcError) -> grpc.StatusCode:
    """Returns the status code of a failed call; UNKNOWN if it carries none."""
    code = error.code() if isinstance(error, grpc.Call | grpc.aio.AioRpcError) else None
    return code if isinstance(code, grpc.StatusCode) else grpc.StatusCode.UNKNOWN


def details_of(error: grpc.RpcError) -> str:
    """Returns the message of a failed call, possibly empty."""
    details = error.details() if isinstance(error, grpc.Call | grpc.aio.AioRpcError) else None
    return details or ""


async def _abort(context: Any, error: Exception) -> NoReturn:
    code, message = status_of(error)
    if code is grpc.StatusCode.INTERNAL:  # the caller gets the message, the log the whole story
        _LOG.error("a call failed by a fault in kfdist itself", exc_info=error)
    await context.abort(code, message)
    raise AssertionError("abort returned")


def _shortened(message: str) -> str:
    encoded = message.encode()
    if len(encoded) <= MAX_DETAILS_BYTES:
        return message
    return encoded[: MAX_DETAILS_BYTES - 3].decode(errors="ignore") + "..."

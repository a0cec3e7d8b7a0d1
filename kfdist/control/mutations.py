"""The identity of a mutation, by which a repeated one gets the first one's answer and has no second effect."""

import hashlib
from dataclasses import dataclass
from typing import Any, Self

import grpc
from google.protobuf.message import Message

from kfdist.control.store import Answer
from kfdist.rpc.status import Refusal


@dataclass(frozen=True, kw_only=True)
class Request:
    """The identity of a mutation: the caller's id for it, and the SHA-256 of its method and content."""

    request_id: str
    digest: str

    @classmethod
    def of(cls, method: str, request: Any) -> Self:
        """Returns the identity of a call: `request` is its message, which has a request id."""
        content = f"{method}\n".encode() + request.SerializeToString(deterministic=True)
        return cls(request_id=request.request_id, digest=hashlib.sha256(content).hexdigest())


def answer_to(request: Request, response: Message) -> Answer:
    """Returns what is kept of a mutation's answer."""
    return Answer(request_id=request.request_id, request_digest=request.digest, message=response.SerializeToString())


def repeated(known: Answer, request: Request) -> bytes:
    """Returns the answer that a mutation got when it came first.

    Raises:
        Refusal: INVALID_ARGUMENT: its id was used for another one.
    """
    if known.request_digest != request.digest:
        raise Refusal(
            grpc.StatusCode.INVALID_ARGUMENT,
            f"request_id {request.request_id!r} was used for another request; every new request needs a new one",
        )
    return known.message

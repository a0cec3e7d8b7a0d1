"""What a rank and its courier say to each other: small JSON messages over a SOCK_SEQPACKET pair.

The socket keeps the borders of messages, so there is no framing. Payloads never pass through it: a job's message
carries two descriptors, one memfd with the input and one for the result. What may be too large for a message (the run's
groups) goes into the memfd of the setup that the courier reads at its start.
"""

import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from kfdist.links.link import LinkContext, LinkCounters
from kfdist.links.shared_memory import create_input, read_private
from kfdist.system.credentials import Credentials
from kfdist.types import InForce, MetricSample, RunSettings

MAX_MESSAGE_BYTES = 1 << 16
"""Largest message; a default socket buffer holds several of them."""

SAMPLES_PER_MESSAGE = 64


@dataclass(frozen=True, kw_only=True)
class Submit:
    """Rank to courier: carry this job. Comes with two descriptors: the input's and the result's memfd.

    Attributes:
        ticket: Names this hand-over; a job that is handed over again gets another.
        group: As in `kfdist.types.Job`; so are the fields below.
        version: See there.
        digest: See there.
        deadline_seconds: See there.
        fingerprint: See there.
        payload_bytes: Size of the input.
        submitted_ns: When the rank submitted it, in nanoseconds since 1970.
    """

    kind: Literal["submit"] = "submit"
    ticket: int
    group: str
    version: int
    digest: str
    deadline_seconds: float
    fingerprint: str
    payload_bytes: int
    submitted_ns: int


@dataclass(frozen=True, kw_only=True)
class Taken:
    """Rank to courier, where jobs are traced: the result of a ticket has been looked at.

    Attributes:
        ticket: The hand-over it belongs to.
        intact: Whether it had its digest.
        at_ns: When, in nanoseconds since 1970.
    """

    kind: Literal["taken"] = "taken"
    ticket: int
    intact: bool
    at_ns: int


@dataclass(frozen=True, kw_only=True)
class Beat:
    """Rank to courier: where the rank stands, and what it measured."""

    kind: Literal["beat"] = "beat"
    step: int
    phase: str
    samples: tuple[MetricSample, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Report:
    """Rank 0 to courier: what the run goes by."""

    kind: Literal["report"] = "report"
    in_force: InForce


@dataclass(frozen=True, kw_only=True)
class Bye:
    """Rank to courier: tell the controller what is left to tell, and end."""

    kind: Literal["bye"] = "bye"


@dataclass(frozen=True, kw_only=True)
class Hello:
    """Courier to rank: it has started and takes jobs."""

    kind: Literal["hello"] = "hello"


@dataclass(frozen=True, kw_only=True)
class Done:
    """Courier to rank: the result of a ticket lies in its memfd.

    Attributes:
        ticket: The hand-over it belongs to.
        payload_bytes: Size of the result.
        digest: SHA-256 of the result, hexadecimal.
        seconds: Wall-clock seconds of the inversion.
        owner: Who did it.
    """

    kind: Literal["done"] = "done"
    ticket: int
    payload_bytes: int
    digest: str
    seconds: float
    owner: str


@dataclass(frozen=True, kw_only=True)
class NewSettings:
    """Courier to rank: what the controller says users want of the run."""

    kind: Literal["new_settings"] = "new_settings"
    settings: RunSettings


@dataclass(frozen=True, kw_only=True)
class Fenced:
    """Courier to rank: a newer start of the run exists, so nobody takes anything from this one any more."""

    kind: Literal["fenced"] = "fenced"


@dataclass(frozen=True, kw_only=True)
class Counted:
    """Courier to rank: what it counted since it last said so."""

    kind: Literal["counted"] = "counted"
    counters: LinkCounters


Message = Submit | Taken | Beat | Report | Bye | Hello | Done | NewSettings | Fenced | Counted

_EXACT = ConfigDict(extra="forbid", strict=True, ser_json_inf_nan="constants")
"""Both sides are of one version: a field too many or of another type is a fault. A gauge may be NaN."""

_MESSAGE: TypeAdapter[Message] = TypeAdapter(Annotated[Message, Field(discriminator="kind")], config=_EXACT)


def encode(message: Message) -> bytes:
    """Returns a message as bytes.

    Raises:
        ValueError: It is larger than MAX_MESSAGE_BYTES.
    """
    data = _MESSAGE.dump_json(message)
    if len(data) > MAX_MESSAGE_BYTES:
        raise ValueError(f"a {type(message).__name__} message of {len(data)} bytes; at most {MAX_MESSAGE_BYTES} fit")
    return data


def decode(data: bytes) -> Message:
    """Returns the message that `encode` turned into `data`.

    Raises:
        ValueError: It is no message of this version of kfdist.
    """
    try:
        return _MESSAGE.validate_json(data)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        where = ".".join(map(str, fault["loc"]))
        raise ValueError(
            f"no message of this version of kfdist: {data[:200]!r} ({': '.join(filter(None, (where, fault['msg'])))})"
        ) from None


def beats(step: int, phase: str, samples: Sequence[MetricSample]) -> Iterator[Beat]:
    """Splits a beat so that each part fits into a message; there is one at least."""
    for start in range(0, max(len(samples), 1), SAMPLES_PER_MESSAGE):
        yield Beat(step=step, phase=phase, samples=tuple(samples[start : start + SAMPLES_PER_MESSAGE]))


def send(channel: socket.socket, data: bytes, descriptors: Sequence[int] = ()) -> None:
    """Sends one encoded message with descriptors.

    Raises:
        BlockingIOError: The channel doesn't block and is full.
        OSError: The other side is gone.
    """
    socket.send_fds(channel, [data], list(descriptors))


def receive(channel: socket.socket) -> tuple[Message, list[int]] | None:
    """Receives one message and its descriptors, which become the caller's; None when the other side is gone.

    Raises:
        BlockingIOError: The channel doesn't block and nothing is there.
        ValueError: What came is no message.
    """
    data, descriptors, flags, _ = socket.recv_fds(channel, MAX_MESSAGE_BYTES, 2)
    if not data:
        return None
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        # Out of descriptors (CTRUNC) or a message over the limit; neither can be mended here.
        for descriptor in descriptors:
            os.close(descriptor)
        raise ValueError("a message lost its end or its descriptors: too many open files, or over the size limit")
    return decode(data), descriptors


@dataclass(frozen=True, kw_only=True)
class CourierSetup:
    """What a courier is told at its start, through a memfd.

    Attributes:
        address: Where the controller listens.
        rank_pid: The process whose end ends the courier.
        process: A random word of that process, which tells it from those with this id in other containers.
        context: What the rank knows of the run.
        credentials: What to show to controller and owners; None where they demand nothing.
    """

    address: str
    rank_pid: int
    process: str = ""
    context: LinkContext
    credentials: Credentials | None = None

    def write(self) -> int:
        """Returns the descriptor of a new memfd that holds the setup."""
        return create_input(_SETUP.dump_json(self))

    @staticmethod
    def read(descriptor: int) -> "CourierSetup":
        """Reads what `write` wrote; the descriptor stays the caller's."""
        return _SETUP.validate_json(read_private(descriptor, os.fstat(descriptor).st_size))


_SETUP = TypeAdapter(CourierSetup)

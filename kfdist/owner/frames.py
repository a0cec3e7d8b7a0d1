"""What an owner and its inversion process say to each other over pipes: a small fixed head, then bytes."""

import struct
from enum import IntEnum
from typing import BinaryIO

HEAD = struct.Struct("<BQd")
"""Kind, bytes that follow, seconds."""


class Answer(IntEnum):
    """Kinds of frames. An owner sends payloads only."""

    PAYLOAD = 0
    GREETING = 1
    """JSON: the fingerprint; the process is ready."""
    RESULT = 2
    """What `kfdist.curvature.jobs.run_job` returned."""
    REFUSAL = 3
    """A sentence: the payload is malformed."""
    FAULT = 4
    """A sentence: the inversion raised."""


def write_frame(stream: BinaryIO, kind: Answer, data: bytes, *, seconds: float = 0.0) -> None:
    """Writes one frame; blocks until it is written."""
    stream.write(HEAD.pack(kind, len(data), seconds))
    stream.write(data)
    stream.flush()


def read_frame(stream: BinaryIO) -> tuple[Answer, float, bytes] | None:
    """Reads one frame (kind, seconds, data); None at the end of the stream."""
    head = stream.read(HEAD.size)
    if len(head) < HEAD.size:
        return None
    kind, size, seconds = HEAD.unpack(head)
    data = stream.read(size)
    return (Answer(kind), seconds, data) if len(data) == size else None

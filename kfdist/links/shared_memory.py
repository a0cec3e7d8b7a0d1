"""Memory shared between a rank and its courier: anonymous files, passed by descriptor.

A memfd has no name, so nothing can leak when a process is killed: the kernel frees it with its last descriptor. It does
not count against the size of /dev/shm, and no resource tracker is needed.
"""

import fcntl
import mmap
import os
from typing import Self

_WORD_BYTES = 8
_INPUT_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL


def create_input(*parts: bytes | memoryview) -> int:
    """Returns the descriptor of a new memfd that holds some parts, in order, and that nobody can change any more."""
    descriptor = os.memfd_create("kfdist-input", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        offset = 0
        for part in parts:
            write_at(descriptor, offset, part)
            offset += len(part)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _INPUT_SEALS)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def mapped(descriptor: int) -> mmap.mmap:
    """Maps what `create_input` returned, to be read; it lasts as long as the object, whatever becomes of descriptors.

    Pages that are never read through it take nothing of this process.
    """
    # Private: older kernels refuse shared mappings of what is sealed against writing, also those that only read.
    return mmap.mmap(descriptor, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)


def create_output() -> int:
    """Returns the descriptor of a new, empty memfd for a result."""
    return os.memfd_create("kfdist-output", os.MFD_CLOEXEC)


def write_at(descriptor: int, offset: int, data: bytes | bytearray | memoryview) -> None:
    """Writes all of `data` at `offset`; the kernel takes at most 2 GiB at a time."""
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def read_private(descriptor: int, size: int) -> bytes:
    """Copies a shared file into memory that nobody else can change.

    Args:
        descriptor: The memfd.
        size: How many bytes it must hold.

    Raises:
        ValueError: It holds another number of bytes.
    """
    actual = os.fstat(descriptor).st_size
    if actual != size:
        raise ValueError(f"shared file holds {actual} bytes where {size} were announced")
    parts, offset = [], 0
    while offset < size:
        part = os.pread(descriptor, size - offset, offset)
        if not part:
            raise ValueError(f"shared file ended at byte {offset} of {size}")
        parts.append(part)
        offset += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


class HeartbeatWord:
    """One integer in shared memory that its writer moves on as long as it is alive and not stuck."""

    def __init__(self, descriptor: int) -> None:
        """Attaches to the memfd of an existing word; the descriptor stays the caller's."""
        self._map = mmap.mmap(descriptor, mmap.PAGESIZE)
        self._word = memoryview(self._map)[:_WORD_BYTES].cast("Q")

    @staticmethod
    def create() -> int:
        """Returns the descriptor of a new word that stands at 0."""
        descriptor = os.memfd_create("kfdist-heartbeat", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, mmap.PAGESIZE)
        return descriptor

    def beat(self) -> None:
        """Moves the word on by one; called by its only writer."""
        self._word[0] += 1

    @property
    def value(self) -> int:
        """Where the word stands."""
        return self._word[0]

    def close(self) -> None:
        """Detaches from the memory; safe to call twice."""
        self._word.release()
        self._map.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

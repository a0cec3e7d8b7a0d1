"""How much memory this process can still have, by the machine, its control groups and its own limits; giving back."""

import ctypes
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from kfdist.system.seat import ranks_here

_UNLIMITED = 1 << 60

_TRIMMED_EVERY = 1 << 27
"""Bytes that come and go before malloc is asked for what is free: while it looks, whoever trains may wait for it."""


class Memory(NamedTuple):
    """An amount of memory.

    Attributes:
        bytes: How much can still be had.
        limit: What sets the limit, in words.
    """

    bytes: int
    limit: str


def available_memory() -> Memory:
    """Returns what this process can still allocate on the host.

    The machine's and its control groups' memory is shared by the processes that a launcher or torchrun started here
    (LOCAL_WORLD_SIZE): each gets an equal part.
    """
    parts = ranks_here()
    shared = [*_machine(), *_control_groups()]
    words = f", shared by {parts} ranks" if parts > 1 else ""
    found = [Memory(memory.bytes // parts, memory.limit + words) for memory in shared] + list(_own_limits())
    return min(found, default=Memory(_UNLIMITED, "no limit that is known"))


def _machine() -> Iterator[Memory]:
    fields = _fields(Path("/proc/meminfo"))
    if "MemAvailable" in fields:
        yield Memory(fields["MemAvailable"] << 10, "the machine's memory")


def _control_groups() -> Iterator[Memory]:
    """Yields what is left in each control group that this process is in, of version 2 or 1, up to the root."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, files = Path("/sys/fs/cgroup"), ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root, files = (
                Path("/sys/fs/cgroup/memory"),
                (
                    "memory.limit_in_bytes",
                    "memory.usage_in_bytes",
                    "total_inactive_file",
                ),
            )
        else:
            continue
        inner = root / path.lstrip("/")
        # In a container, the path may be the host's; the group itself is then mounted as the root.
        for group in {inner, *(parent for parent in inner.parents if parent.is_relative_to(root))}:
            yield from _left_in(group, *files)


def _left_in(group: Path, limit_file: str, usage_file: str, cache: str) -> Iterator[Memory]:
    try:
        limit = int((group / limit_file).read_text(encoding="ascii"))
        usage = int((group / usage_file).read_text(encoding="ascii"))
    except (OSError, ValueError):  # no such group, or "max": no limit
        return
    if limit < _UNLIMITED:
        reclaimable = _fields(group / "memory.stat").get(cache, 0)  # read from files, and dropped when memory is short
        yield Memory(max(0, limit - usage + reclaimable), f"the limit of {limit} bytes of the control group")


def _own_limits() -> Iterator[Memory]:
    used = _fields(Path("/proc/self/status"))
    for number, field, name in (
        (resource.RLIMIT_AS, "VmSize", "RLIMIT_AS, the process's limit of address space (ulimit -v)"),
        (resource.RLIMIT_DATA, "VmData", "RLIMIT_DATA, the process's limit of data (ulimit -d)"),
    ):
        soft, _ = resource.getrlimit(number)
        if soft != resource.RLIM_INFINITY and field in used:
            yield Memory(max(0, soft - (used[field] << 10)), name)


def _fields(path: Path) -> dict[str, int]:
    """Reads lines of a name and a number, with or without a colon between."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    words = [line.replace(":", " ").split() for line in lines]
    return {each[0]: int(each[1]) for each in words if len(each) >= 2 and each[1].isdecimal()}


def in_words(size: float) -> str:
    """Returns a number of bytes as people write it."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.3g} {unit}" if size < 1000 else f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.3g} GiB"


class FreeMemory:
    """What malloc keeps though it is free, given back once in a while.

    Factors of up to 32 MB lie in a heap among activations that come and go. Whatever long-lived tensor is freed there
    leaves a gap that nobody else can have, and a rank's gaps add up to a third of its statistics.
    """

    def __init__(self) -> None:
        self._passed = 0

    def passed(self, size: int) -> None:
        """Notes that so many bytes came and went; any thread may call it, one at a time."""
        self._passed += size
        if self._passed >= _TRIMMED_EVERY:
            self._passed = 0
            give_back()


def give_back() -> bool:
    """Gives free pages back to the system; returns whether there were any. Does nothing where malloc isn't glibc's."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return trim is not None and bool(trim(0))  # ctypes lets go of the GIL meanwhile

"""What the thread that trains does for owners: by a profile of it, and by the bytes that it copies."""

import cProfile
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

from torch import Tensor

from kfdist.bench.trainee import Trainee
from kfdist.runtime.preconditioner import Preconditioner
from kfdist.torch_internals import TorchDispatchMode, tree_leaves

_COPIES = frozenset({"copy_", "clone", "_to_copy", "contiguous"})

KINDS: Mapping[str, tuple[str, ...]] = {
    "encodes": ("pack_parts", "job_parts", "encode_result", "packed_statistic", "job_record"),
    "hashes": ("digest", "digest_of"),
    "writes to shared memory": ("create_input", "write_at"),
    "decodes results": ("decode_result", "unpack"),
}
"""What the training thread might do for owners, and functions that do it; the first three are a link's thread's."""


class CopyCounter(TorchDispatchMode):
    """Counts the bytes that tensors' copies write, in the thread that enters it.

    Attributes:
        bytes: How many.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation, and counts it if it copies."""
        del types
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in _COPIES:
            self.bytes += sum(each.nbytes for each in tree_leaves(result) if isinstance(each, Tensor))
        return result

    @contextmanager
    def counting(self, part: object, verb: str) -> Iterator[None]:
        """Counts in a method of an object, in the place of which stands one that counts."""
        method = getattr(part, verb)

        def counted(*arguments: Any, **named: Any) -> Any:
            with self:
                return method(*arguments, **named)

        setattr(part, verb, counted)
        try:
            yield
        finally:
            delattr(part, verb)


@dataclass
class Handled:
    """What the thread that trains did for the owners over some steps.

    Attributes:
        steps: How many.
        jobs_bytes: Payload bytes of the jobs that left.
        copied: Bytes that it copied in the phases that hand statistics over.
        calls: Calls of functions, by kind.
        seconds: Seconds in them, by kind.
    """

    steps: int = 0
    jobs_bytes: int = 0
    copied: int = 0
    calls: Counter[str] = field(default_factory=Counter)
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))


def profile_steps(trainee: Trainee, preconditioner: Preconditioner, *, steps: int) -> Handled:
    """Says what the training thread does for the owners in some steps, by a profile of it and its copies' bytes."""
    pipeline, copies = preconditioner.pipeline, CopyCounter()
    sent, found = preconditioner.counters()["bytes"]["jobs"], cProfile.Profile()
    with copies.counting(pipeline.reducer, "reduce"), copies.counting(pipeline.inverting, "take"):
        for _ in range(steps):
            found.enable()
            trainee.step()
            found.disable()
    handled = Handled(steps=steps, jobs_bytes=preconditioner.counters()["bytes"]["jobs"] - sent, copied=copies.bytes)
    for entry in found.getstats():
        if kind := kind_of(entry.code):
            handled.calls[kind] += entry.callcount
            handled.seconds[kind] += entry.inlinetime
    return handled


def kind_of(code: CodeType | str) -> str | None:
    """Returns which kind of `KINDS` a profiled function belongs to.

    Args:
        code: A function's code, or the words that a profile has for a builtin.
    """
    if isinstance(code, str):
        return "hashes" if "_hashlib" in code or "sha256" in code else None
    if f"{os.sep}kfdist{os.sep}" not in code.co_filename:
        return None
    return next((kind for kind, names in KINDS.items() if code.co_name in names), None)

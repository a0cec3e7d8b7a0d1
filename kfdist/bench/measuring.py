"""What all measurements share: seconds and memory of one thread, by width too, and the machine they belong to."""

import os
import platform
import subprocess
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from kfdist.curvature.inverse import AbstractPreconditioner
from kfdist.curvature.inverter import AbstractInverter
from kfdist.system.provenance import processor_field, versions
from kfdist.torch_internals import TorchDispatchMode, storage_id, tree_leaves

Given = TypeVar("Given")


def measured(measure: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """Measures on one thread; returns what was found behind the time, load, hardware and versions it belongs to."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        load, begun = _load_average(), time.perf_counter()
        found = measure()
        return {
            "measured": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(time.perf_counter() - begun, 2),
            "load_average": {"start": load, "end": _load_average()},
            "hardware": {
                "machine": platform.machine(),
                "cpu": processor_field("model name") or platform.processor(),
                "vector_instructions": torch.backends.cpu.get_cpu_capability(),
                "cores": os.cpu_count(),
                "threads": torch.get_num_threads(),
            },
            "versions": versions(),
            "commit": _commit(),
            **found,
        }
    finally:
        torch.set_num_threads(threads)


@cache  # results that a measurement writes on its way don't change what measured
def _commit() -> str | None:
    """Returns the commit of the checkout that this package is in, and whether it was changed; None outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _load_average() -> float:
    """Returns how many processes wanted a core during the last minute, this one among them."""
    return round(os.getloadavg()[0], 2)


def measure_widths(
    widths: Sequence[int],
    powers: Mapping[str, int],
    *,
    limit_seconds: float,
    problem: Callable[[int], Given],
    measure: Callable[[str, Given], dict[str, Any]],
) -> list[dict[str, Any]]:
    """Measures methods on layers of rising width d, as far as that is affordable.

    Args:
        widths: All d.
        powers: By method, the power of d that its time is taken to grow with.
        limit_seconds: A method isn't run at a width if from the width before it would take longer.
        problem: Makes what is measured at a width.
        measure: Measures a method; "seconds" are what the limit is about.

    Returns:
        Per width, "d" and each method's measurement; None where it wasn't run, never an extrapolation.
    """
    rows: list[dict[str, Any]] = []

    def affordable(name: str, d: int) -> bool:
        if not rows:
            return True
        last = rows[-1][name]
        return last is not None and last["seconds"] * (d / rows[-1]["d"]) ** powers[name] <= limit_seconds

    for d in sorted(widths):
        given = problem(d)
        measurements = {name: measure(name, given) if affordable(name, d) else None for name in powers}
        rows.append({"d": d, **measurements})
    return rows


@dataclass(frozen=True, kw_only=True)
class Update:
    """One inversion and one application.

    Attributes:
        invert: CPU seconds of this thread in the inversion; what else the machine does hardly matters to them.
        apply: The same of the application.
        inverse: What the inversion made.
        direction: What the application gave.
    """

    invert: float
    apply: float
    inverse: AbstractPreconditioner
    direction: Tensor


def update(inverter: AbstractInverter, statistics: Any, gradient: Tensor, damping: float) -> Update:
    """Inverts statistics and applies the inverse to a gradient `[c, p, q]`.

    Raises:
        RuntimeError: The method could not invert them.
    """
    begun = time.thread_time()
    inverse = inverter.invert(statistics, damping=damping, previous={}, seed=0).preconditioner
    inverted = time.thread_time()
    if inverse is None:
        raise RuntimeError(f"{inverter.name} could not invert the benchmark's {type(statistics).__name__}")
    direction = inverse.apply(gradient, damping)
    return Update(invert=inverted - begun, apply=time.thread_time() - inverted, inverse=inverse, direction=direction)


class AllocationCounter(TorchDispatchMode):
    """Watches the operations inside a `with` block.

    Work space inside an operation (of LAPACK, for instance) isn't seen; what the operations return is.

    Attributes:
        live_bytes: Allocated inside the block and still in use.
        peak_bytes: The most of it at any time.
        shapes: Shape of everything that an operation returned in newly allocated memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = self.peak_bytes = 0
        self.shapes: set[tuple[int, ...]] = set()
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation and takes note of what it returned."""
        del types
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self._watch(tensor.untyped_storage())
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and self._watch(tensor.untyped_storage()):
                self._count(tensor.untyped_storage())
                self.shapes.add(tuple(tensor.shape))
        return result

    def _watch(self, storage: torch.UntypedStorage) -> bool:
        """Remembers a storage for as long as it lives; returns whether it is new."""
        key = storage_id(storage)
        if key in self._known:
            return False
        self._known.add(key)
        weakref.finalize(storage, self._known.discard, key)
        return True

    def _count(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self.live_bytes -= size

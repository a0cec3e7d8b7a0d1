"""Words used everywhere: names, steps, versions, and the records that cross process borders.

Nothing here does more than hold its fields, and nothing imports torch: the courier and the controller use it too.
"""

import hashlib
import math
import mmap
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Literal, Self

BlockName = str
"""Dotted module name of a layer, without `module.` and `_orig_mod.`."""

GroupName = str
"""Name of a group of blocks, the unit of phase, version and adoption; a single block's group has its name."""

RUN_NAME_PATTERN = r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?"
"""What a run may be called: it becomes part of paths, metrics and messages."""

Fisher = Literal["empirical", "mc", "exact"]
"""Which output gradients make the Fisher matrix: the training loss's own; those of targets drawn from the model; those
of all targets, each by its probability."""

WeightSharing = Literal["expand", "reduce"]
"""How a linear layer treats the positions of a sequence: each one a row, or pooled before the loss."""

CHUNK_BYTES = 1 << 20
"""Largest chunk of a payload in one gRPC message (protos/kfdist/v1/inversion.proto)."""

MAX_THREADS = 1024
"""Most CPU threads of a process: no machine has as many cores, and a job that asked for more would end its process."""

MAX_RANKS = 1 << 20
MAX_OWNERS = 4096
"""Ranks of a run, and owners, that a controller takes."""

MAX_STEPS = 10**12
"""More than any run makes; messages, and the float64 in which ranks share settings, hold it exactly."""

MAX_DEADLINE_SECONDS = 86_400
"""Longest deadline of an inversion that owners take; none of any layer takes a day."""

MAX_WAIT_SECONDS = 10**8
"""Three years: more than anybody waits, and what timers of all kinds can hold."""


@dataclass(frozen=True, kw_only=True)
class BlockShape:
    """Shape of a block's gradient seen as `groups` matrices.

    Attributes:
        d_out: Rows p of each matrix: output features (or channels) per group.
        d_in: Columns q of each matrix: input features per group, plus one where the layer has a bias.
        groups: Number c of independent matrices (grouped convolution), 1 for most layers.
        convolution: Whether the weight is used at many positions of an image, so that an example has many rows.
        modes: Dimensions of each of the tensors that methods on gradients see in place of the matrices: `d_out`, and
            those whose product is `d_in`. Empty where there are only matrices.
    """

    d_out: int
    d_in: int
    groups: int = 1
    convolution: bool = False
    modes: tuple[int, ...] = ()

    @classmethod
    def of_tensors(cls, modes: tuple[int, ...], groups: int = 1) -> Self:
        """Makes the shape of `groups` tensors of these dimensions."""
        return cls(d_out=modes[0], d_in=math.prod(modes[1:]), groups=groups, modes=modes)

    @property
    def dimensions(self) -> tuple[int, ...]:
        """Dimensions of each of the tensors; of matrices both of theirs."""
        return self.modes or (self.d_out, self.d_in)


@dataclass(frozen=True, kw_only=True)
class GroupSpec:
    """A group of blocks as the assignment sees it.

    Attributes:
        name: Unique in the run.
        cost: Floating-point operations of one inversion, estimated.
        position: Place in the model, from 0.
        bytes: Size of one job's payload, estimated; balances the courier ranks.
    """

    name: GroupName
    cost: float
    position: int
    bytes: int


class LateBytes:
    """Bytes that are made when somebody first asks for them: once, in whichever thread that is.

    Args:
        make: Makes them, at once or in parts, of what never changes. It is let go, with all that it holds, when it has
            been called.
    """

    def __init__(self, make: Callable[[], bytes | Sequence[bytes | memoryview]]) -> None:
        self._make: Callable[[], bytes | Sequence[bytes | memoryview]] | None = make
        self._made: Sequence[bytes | memoryview] | mmap.mmap = ()
        self._lock = threading.Lock()

    @classmethod
    def of(cls, value: bytes) -> Self:
        """Wraps bytes that are there already."""
        return cls(lambda: value)

    @property
    def value(self) -> bytes:
        """The bytes; a copy of them where `move_to` was called."""
        made = self._held(whole=True)
        return made[:] if isinstance(made, mmap.mmap) else bytes(made[0])  # of bytes no copy is made

    @property
    def parts(self) -> Sequence[bytes | memoryview]:
        """The bytes in parts, in order; nothing is copied, unless `move_to` was called."""
        made = self._held()
        return (made[:],) if isinstance(made, mmap.mmap) else made

    @property
    def size(self) -> int:
        """How many there are."""
        made = self._held()
        return len(made) if isinstance(made, mmap.mmap) else sum(map(len, made))

    def move_to(self, shared: mmap.mmap) -> None:
        """Lets go of the bytes, which from now on are those of shared memory that nobody can change."""
        with self._lock:
            self._made, self._make = shared, None

    def _held(self, *, whole: bool = False) -> Sequence[bytes | memoryview] | mmap.mmap:
        with self._lock:
            if self._make is not None:
                made = self._make()
                self._made, self._make = (made,) if isinstance(made, bytes) else made, None
            if whole and not isinstance(self._made, mmap.mmap) and not _is_one(self._made):
                self._made = (b"".join(self._made),)
            return self._made


def _is_one(parts: Sequence[bytes | memoryview]) -> bool:
    return len(parts) == 1 and isinstance(parts[0], bytes)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One inversion to be done. Its result is a function of `payload` alone.

    Attributes:
        run: Name of the run.
        epoch: Start of the run that it belongs to (design: fencing).
        group: The group of blocks.
        version: Step whose statistics are in the payload.
        content: Makes the payload. A thread of the link asks for it, not the thread that trains.
        deadline_seconds: How long one attempt may run before it is killed.
        fingerprint: What an owner's own fingerprint must equal; empty where any owner will do (asap).
    """

    run: str
    epoch: int
    group: GroupName
    version: int
    content: LateBytes
    deadline_seconds: float
    fingerprint: str = ""

    @property
    def payload(self) -> bytes:
        """Everything the inversion depends on, in the format of `kfdist.curvature.jobs`."""
        return self.content.value

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the payload, hexadecimal."""
        digest = hashlib.sha256()
        for part in self.content.parts:
            digest.update(part)
        return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class JobResult:
    """A finished inversion.

    Attributes:
        group: The group of blocks.
        version: Step whose statistics are in it.
        payload: The result in the format of `kfdist.curvature.jobs`; it says itself whether the inversion failed.
        seconds: Wall-clock seconds of the inversion.
        owner: Who did it; "local" without a service.
    """

    group: GroupName
    version: int
    payload: bytes
    seconds: float
    owner: str

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the payload, hexadecimal."""
        return hashlib.sha256(self.payload).hexdigest()


@dataclass(frozen=True, kw_only=True)
class MetricSample:
    """One measured value on its way to the controller.

    Attributes:
        name: A name declared in `kfdist.telemetry.metrics`.
        value: A gauge's value, a counter's total since the sender's start, or one observation of a histogram.
        labels: Label values by label name.
    """

    name: str
    value: float
    labels: Mapping[str, str] = field(default_factory=dict)


class Desired(StrEnum):
    """What users want a run to do."""

    RUNNING = "running"
    PAUSED = "paused"
    STOPPED = "stopped"


ENDED_PHASES = frozenset({"finished", "stopped", "failed"})
"""The phases of a rank that does nothing more; until it has told one of them, its silence is that of a lost rank."""

Value = int | float | str
"""What a setting of the method may be."""


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What users asked of a run; all ranks obey at the same step.

    Attributes:
        revision: Moves at every change, never back.
        desired: What the run is to do.
        checkpoint_serial: Moves at every request for a checkpoint.
        changes: New settings of the method by name (`kfdist.policies.tuning`); None: as configured again. Others stay
            as they are: as configured, or as a checkpoint restored them.
        refresh_serial: Moves at every request for fresh inverses.
        refresh: The groups that the newest such request names; none: all.
    """

    revision: int = 0
    desired: Desired = Desired.RUNNING
    checkpoint_serial: int = 0
    changes: Mapping[str, Value | None] = field(default_factory=dict)
    refresh_serial: int = 0
    refresh: tuple[GroupName, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Obeyed:
    """A revision of the settings that all ranks have taken up.

    Attributes:
        revision: The revision.
        step: The step at which they agreed on it.
        refused: Why they left the settings of the method as they were; empty where they didn't.
    """

    revision: int
    step: int
    refused: str = ""


@dataclass(frozen=True, kw_only=True)
class InForce:
    """What a run's ranks go by, as rank 0 tells it.

    Attributes:
        values: The settings of the method in force, by name.
        fixed: Why some can't be changed, by name.
        job_periods: Own periods of methods: multiples of factor_period that divide inverse_period.
        late_damping: Methods that damp when they invert, so that a new damping acts from their next versions on.
        obeyed: The newest revisions taken up, oldest first.
        changed: The names of settings that users have changed, in this start of the run or an earlier one.
    """

    values: Mapping[str, Value] = field(default_factory=dict)
    fixed: Mapping[str, str] = field(default_factory=dict)
    job_periods: tuple[int, ...] = ()
    late_damping: tuple[str, ...] = ()
    obeyed: tuple[Obeyed, ...] = ()
    changed: tuple[str, ...] = ()

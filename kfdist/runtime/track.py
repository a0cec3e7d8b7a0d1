"""One record per group of blocks: what a rank knows of it, from the statistics it ships to the snapshot in use."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from kfdist.comm.background import PayloadBroadcast
from kfdist.curvature.block_memory import BlockMemory
from kfdist.curvature.inverse import AbstractPreconditioner
from kfdist.curvature.inverter import Inversion
from kfdist.curvature.jobs import encode_result
from kfdist.policies.adoption import NO_VERSION, AdoptionLedger
from kfdist.policies.staleness import NOTHING, Adoption, Decision
from kfdist.runtime.invert.job_book import JobLine
from kfdist.runtime.plan.groups import BlockGroup
from kfdist.types import BlockName

_MOST_AT_ONCE = 8
"""Results without statistics in a row after which the next try waits for a folding. By then gradients that overflow at
the start of AMP are over; a layer that nothing uses, or that is frozen, would have every step measured for it, with
sums of zeros on their way between the ranks and compiled code run eagerly."""


@dataclass(frozen=True)
class Snapshot:
    """An immutable result in use.

    Attributes:
        version: Step whose statistics are in it; `NO_VERSION` before the first good result.
        preconditioners: By block name.
        outcomes: How each block's inversion went, by block name; empty where the ranks made it themselves.
    """

    version: int = NO_VERSION
    preconditioners: Mapping[BlockName, AbstractPreconditioner] = field(default_factory=dict)
    outcomes: Mapping[BlockName, Inversion] = field(default_factory=dict)

    @property
    def states(self) -> dict[BlockName, Mapping[str, Tensor]]:
        """What each block's inverter wants to see again, by block name."""
        return {name: outcome.state for name, outcome in self.outcomes.items()}

    def encoded(self) -> bytes:
        """Returns the bytes it was decoded from, the same on all ranks; empty before the first one.

        They aren't kept beside the tensors: they are as many, and only a state for a checkpoint has them.
        """
        if not self.preconditioners:
            return b""
        return encode_result(self.preconditioners, self.outcomes)


@dataclass(eq=False)
class Track:
    """What one rank knows of one group.

    A rank has a list of them, one per group in the model's order: `group.index` is a track's place in it. What is the
    same on all ranks decides which collectives they enter; the rest belongs to this rank alone.

    Attributes:
        group: The group.
        jobs: Jobs and frozen results; empty unless this rank is the group's courier rank.
        ledger: This rank's view of the adoption protocol.
        flight: The broadcast under way, entered by all ranks.
        rejections: How often broadcasts were given up since the last adoption; the same on all ranks.
        pending: Versions shipped and not yet adopted, oldest first; the same on all ranks.
        snapshot: In use; the same on all ranks.
        memories: What each block keeps from step to step beside its snapshot; the same on all ranks.
        calibrations: How often the memories of the snapshot in use were folded: 0 where it waits for the first, None
            where it is not calibrated. The same on all ranks.
        delay: Steps from the statistics of the snapshot in use to its adoption; None before one or after a resume.
        without_statistics: Whether no rank had any statistics for the newest result, as far as it is known; the same on
            all ranks.
        fruitless: How many results in a row had none; likewise.
        prepared: What the application has worked out of the snapshot in use and its memories, and goes with them.
    """

    group: BlockGroup
    jobs: JobLine
    ledger: AdoptionLedger = field(default_factory=AdoptionLedger)
    flight: PayloadBroadcast | None = None
    rejections: int = 0
    pending: list[int] = field(default_factory=list)
    snapshot: Snapshot = field(default_factory=Snapshot)
    memories: dict[BlockName, BlockMemory] = field(default_factory=dict)
    calibrations: int | None = None
    delay: int | None = None
    without_statistics: bool = False
    fruitless: int = 0
    prepared: object = None
    _taken: dict[int, float] = field(default_factory=dict)

    @classmethod
    def of(cls, group: BlockGroup, *, queued: bool) -> "Track":
        """Makes the track of a group of which nothing has been shipped yet.

        Args:
            group: The group.
            queued: Whether every job runs, in order (see `JobLine`).
        """
        jobs = JobLine(queued=queued, online=group.inverter.online)
        return cls(group, jobs, memories={block.name: BlockMemory() for block in group.blocks})

    @property
    def starves(self) -> bool:
        """Whether the group is due out of turn, because its newest result had no statistics and none is under way."""
        return self.without_statistics and not self.pending

    @property
    def hurries(self) -> bool:
        """Whether it is due at once, and not when it folds: no more after so many results, as of a layer not in use."""
        return self.starves and self.fruitless <= _MOST_AT_ONCE and not self.group.inverter.patient

    def tried(self, *, found: bool) -> None:
        """Notes whether any rank had statistics for a result."""
        self.without_statistics, self.fruitless = not found, 0 if found else self.fruitless + 1

    def outgrown(self, damping: float) -> bool:
        """Says whether the snapshot in use has too few eigenpairs for this damping, and no newer one is on its way.

        One that the newest inversion, a failed one, left in use stays until the next is due.
        """
        newest = self.ledger.adopted == self.snapshot.version and not self.pending
        return newest and not all(each.serves(damping) for each in self.snapshot.preconditioners.values())

    def staleness(self, step: int) -> int:
        """Returns the age in steps of the snapshot at `step`; step + 1 where there is none."""
        return step - self.snapshot.version

    def decision(self, step: int, adoption: Adoption) -> Decision:
        """Returns what the bounds on staleness say of the snapshot in use; nothing where there is none yet."""
        return adoption.decide(self.staleness(step)) if self.snapshot.preconditioners else NOTHING

    def age_seconds(self) -> float | None:
        """Returns how old the statistics in use are; None before the first snapshot or after a resume."""
        taken = self._taken.get(self.snapshot.version)
        return None if taken is None else time.monotonic() - taken

    def measured(self, version: int) -> None:
        """Remembers when a version's statistics were taken, and forgets those of versions that are over."""
        self._taken = {each: at for each, at in self._taken.items() if each in (self.snapshot.version, *self.pending)}
        self._taken[version] = time.monotonic()

    def ship(self, version: int) -> None:
        """All ranks know that this version's statistics are on their way to the inverters."""
        self.measured(version)
        self.pending.append(version)

    def adopt(self, version: int) -> None:
        """All ranks take this version into use: its broadcast is over, its slot and the older ones are free."""
        self.ledger.adopt(version)
        self.flight, self.rejections = None, 0
        self.jobs.release(version)
        self.pending = [each for each in self.pending if each > version]

    def abandon(self) -> None:
        """All ranks forget the broadcast under way; its result stays with the courier rank."""
        self.flight = None
        self.ledger.give_up()

"""The snapshots in use: per group, the version adopted by all ranks and its preconditioners."""

import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from kfdist.comm.host_copy import HostCopy
from kfdist.curvature.inverse import AbstractPreconditioner, Memory
from kfdist.curvature.inverter import Outcome
from kfdist.curvature.jobs import NO_STATISTICS, decode_result, encode_result
from kfdist.curvature.ladder import BlockOutcome
from kfdist.errors import KfdistWarning
from kfdist.policies.adoption import NO_VERSION
from kfdist.runtime.apply.directions import MEASURED
from kfdist.runtime.plan.groups import BlockGroup
from kfdist.wire.records import contiguous, tensor_fields, with_tensors


@dataclass(frozen=True)
class Snapshot:
    """An immutable result in use.

    Attributes:
        version: Step whose statistics are in it; `NO_VERSION` before the first good result.
        payload: The bytes it was decoded from, the same on all ranks; empty where the ranks made it themselves.
        preconditioners: By block name.
        outcomes: How each block's inversion went, by block name; empty where the ranks made it themselves.
    """

    version: int = NO_VERSION
    payload: bytes = b""
    preconditioners: Mapping[str, AbstractPreconditioner] = field(default_factory=dict)
    outcomes: Mapping[str, BlockOutcome] = field(default_factory=dict)

    @property
    def states(self) -> dict[str, Mapping[str, torch.Tensor]]:
        """What each block's inverter wants to see again, by block name."""
        return {name: outcome.state for name, outcome in self.outcomes.items()}


class SnapshotStore:
    """The newest good snapshot of every group. All ranks make the same calls with the same bytes.

    Args:
        groups: All groups.
        device: Where the preconditioners are used.
        speaks: Whether this rank warns of what all ranks see.

    Attributes:
        failures: Adopted results without a preconditioner, by reason.
        degraded: Adopted blocks whose inversion didn't go as configured, by outcome.
        memories: What each block keeps from step to step beside its snapshot, by block name.
        calibrations: By group, how often the memory of the snapshot in use was folded; 0 where it waits for the first.
    """

    def __init__(self, groups: Sequence[BlockGroup], device: torch.device, *, speaks: bool) -> None:
        self._device = device
        self._speaks = speaks
        self._spoken: set[tuple[str, Outcome]] = set()
        self._snapshots = [Snapshot() for _ in groups]
        self._without_statistics = [False] * len(groups)
        self._unsettled: dict[int, tuple[int, HostCopy]] = {}
        self._times: dict[int, float] = {}
        self.failures: dict[str, int] = {}
        self.degraded: Counter[str] = Counter()
        self.memories: dict[str, Memory] = {block.name: {} for group in groups for block in group.blocks}
        self.calibrations: dict[int, int] = {}

    def adopt(self, group: int, version: int, payload: bytes) -> bool:
        """Takes a version into use.

        A failed inversion keeps the last good snapshot in use, so that staleness goes on growing visibly.

        Returns:
            Whether the result was good.
        """
        result = decode_result(payload, device=self._device)
        self._without_statistics[group] = result.failed and result.reason == NO_STATISTICS
        if result.failed:
            self.failures[result.reason] = self.failures.get(result.reason, 0) + 1
            return False
        good = {name: each for name, each in result.outcomes.items() if each.preconditioner is not None}
        for name, each in good.items():
            self._note(name, version, each)
        self._take(
            group,
            Snapshot(
                version,
                payload,
                {name: each.preconditioner for name, each in good.items() if each.preconditioner is not None},
                good,
            ),
        )
        return True

    def adopt_own(
        self,
        group: int,
        version: int,
        preconditioners: Mapping[str, AbstractPreconditioner],
        measured: Mapping[str, torch.Tensor],
    ) -> None:
        """Takes into use what every rank made for itself, of equal statistics.

        Where nothing was measured the numbers in use stay, without a host sync; the version goes on.

        Args:
            group: The group.
            version: The step.
            preconditioners: By block.
            measured: By block, a boolean scalar.
        """
        before, kept, known = self._snapshots[group].preconditioners, {}, {}
        for name, new in preconditioners.items():
            # Row-major, as after a resume: the memory layout decides on the last bits of products.
            kept[name], known[name] = contiguous(new), measured[name]
            if name in before and _shapes(before[name]) == _shapes(new):
                old, now = tensor_fields(before[name]), measured[name]
                chosen = {key: torch.where(now, each, old[key]) for key, each in tensor_fields(kept[name]).items()}
                kept[name] = contiguous(with_tensors(new, chosen))
                known[name] = now | self.memories[name].get(MEASURED, now)
        self._take(group, Snapshot(version, b"", kept, {}))
        for name in kept:
            self.memories[name][MEASURED] = known[name]
        self.ask_whether_measured(group)

    def ask_whether_measured(self, group: int) -> None:
        """Sends for what `settle` reads, where the ranks made the snapshot in use themselves."""
        snapshot = self._snapshots[group]
        flags = [self.memories[name][MEASURED] for name in snapshot.preconditioners if MEASURED in self.memories[name]]
        if flags:
            self._without_statistics[group] = False
            self._unsettled[group] = (snapshot.version, HostCopy([torch.stack(flags).all()]))

    def settle(self, step: int) -> dict[int, int]:
        """Looks, at the end of a step, whether what the ranks made themselves before it had any statistics.

        One step late, so that the host doesn't wait for the device; the same on all ranks, and at the same step.

        Returns:
            How many steps, this one included, the groups that had none left their gradients as they were.
        """
        plain = {}
        for group in [group for group, (version, _) in self._unsettled.items() if version < step]:
            version, measured = self._unsettled.pop(group)
            self._without_statistics[group] = not measured.wait()[0]
            if self._without_statistics[group]:
                plain[group] = step - version + 1
        return plain

    def _take(self, group: int, snapshot: Snapshot) -> None:
        self._snapshots[group] = snapshot
        for name, preconditioner in snapshot.preconditioners.items():
            if not preconditioner.keeps_memory:
                self.memories[name] = {}
        self.calibrations.pop(group, None)
        if any(preconditioner.calibrated for preconditioner in snapshot.preconditioners.values()):
            self.calibrations[group] = 0

    def payload(self, group: int) -> bytes:
        """Returns a snapshot's bytes, the same on all ranks; empty before the first one."""
        snapshot = self._snapshots[group]
        if snapshot.payload or not snapshot.preconditioners:
            return snapshot.payload
        return encode_result(snapshot.preconditioners)

    def _note(self, block: str, version: int, outcome: BlockOutcome) -> None:
        """Counts an inversion that didn't go as configured, and says so once per block and outcome."""
        if outcome.outcome is Outcome.DONE:
            return
        self.degraded[str(outcome.outcome)] += 1
        if self._speaks and (block, outcome.outcome) not in self._spoken:
            self._spoken.add((block, outcome.outcome))
            warnings.warn(
                f"block {block!r}, version {version}: {outcome.outcome.sentence} {outcome.reason}".rstrip(),
                KfdistWarning,
                stacklevel=2,
            )

    def __getitem__(self, group: int) -> Snapshot:
        return self._snapshots[group]

    def starving(self, group: int) -> bool:
        """Says whether no rank had any statistics for the group's newest result, as far as it is known.

        The group is due again then.
        """
        return self._without_statistics[group]

    def mark_starving(self, group: int) -> None:
        """Restores what a checkpoint says of `starving`."""
        self._without_statistics[group] = True

    def note_time(self, step: int) -> None:
        """Remembers when a step's statistics were taken, for staleness in seconds."""
        self._times[step] = time.monotonic()
        oldest = min(snapshot.version for snapshot in self._snapshots)
        for version in [version for version in self._times if version < oldest]:
            del self._times[version]

    def age_seconds(self, group: int) -> float | None:
        """Seconds since the statistics in use were taken; None before the first snapshot or after a resume."""
        taken = self._times.get(self._snapshots[group].version)
        return None if taken is None else time.monotonic() - taken


def _shapes(preconditioner: AbstractPreconditioner) -> dict[str, torch.Size]:
    """Returns the shapes of its tensors; another number of ranks gathers another number of rows."""
    return {name: tensor.shape for name, tensor in tensor_fields(preconditioner).items()}

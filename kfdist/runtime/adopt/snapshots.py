"""Takes results into use, on all ranks alike: what of them is good, and what became of the rest."""

import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from kfdist.comm.host_copy import HostCopy
from kfdist.curvature.block_memory import BlockMemory
from kfdist.curvature.inverse import AbstractPreconditioner
from kfdist.curvature.inverter import Inversion, Outcome
from kfdist.curvature.jobs import NO_STATISTICS, decode_result
from kfdist.errors import KfdistWarning
from kfdist.runtime.counters import PipelineCounters
from kfdist.runtime.invert.own import OwnInversion
from kfdist.runtime.track import Snapshot, Track
from kfdist.types import BlockName
from kfdist.wire.records import contiguous, map_tensors, tensor_fields


class SnapshotInstaller:
    """Takes versions into use. All ranks make the same calls with the same bytes.

    Args:
        device: Where the preconditioners are used.
        counters: Counts what failed or didn't go as configured.
        warns: Whether this rank warns of what holds for all ranks.
    """

    def __init__(self, device: torch.device, counters: PipelineCounters, *, warns: bool) -> None:
        self._device = device
        self._counters = counters
        self._warns = warns
        self._warned: set[tuple[BlockName, Outcome]] = set()
        self._unsettled: dict[Track, tuple[int, HostCopy]] = {}

    def install(self, track: Track, version: int, payload: bytes) -> bool:
        """Takes a version into use.

        A failed inversion keeps the last good snapshot in use, so that staleness goes on growing visibly.

        Returns:
            Whether the result was good.
        """
        result = decode_result(payload, device=self._device)
        track.tried(found=not (result.failed and result.reason == NO_STATISTICS))
        if result.failed:
            self._counters.failures[result.reason] += 1
            return False
        preconditioners = {}
        for name, outcome in result.outcomes.items():
            if outcome.preconditioner is not None:
                self._note(name, version, outcome)
                preconditioners[name] = outcome.preconditioner
        _use(track, Snapshot(version, preconditioners, result.outcomes))
        return True

    def install_own(self, track: Track, version: int, made: OwnInversion) -> None:
        """Takes into use what every rank made for itself, of equal statistics.

        Where nothing was measured the numbers in use stay, without a host sync; the version goes on.
        """
        track.measured(version)
        before, kept, known = track.snapshot.preconditioners, {}, {}
        for name, new in made.preconditioners.items():
            # Row-major, as after a resume: the memory layout decides on the last bits of products.
            kept[name], known[name] = contiguous(new), made.measured[name]
            if name in before and _shapes(before[name]) == _shapes(new):
                now = made.measured[name]
                kept[name] = contiguous(map_tensors(partial(torch.where, now), kept[name], before[name]))
                ever = track.memories[name].measured
                known[name] = now if ever is None else now | ever
        _use(track, Snapshot(version, kept))
        for name in kept:
            track.memories[name].measured = known[name]
        self.ask_whether_measured(track)

    def restore_memory(self, track: Track, block: BlockName, state: Mapping[str, Any]) -> None:
        """Goes on from what a checkpoint has of a block's memory."""
        on_host = track.group.inverter.produces.on_host
        track.memories[block] = BlockMemory.of_state(state, self._device, on_host=on_host)
        track.prepared = None

    def ask_whether_measured(self, track: Track) -> None:
        """Sends for what `settle` reads, where the ranks made the snapshot in use themselves."""
        memories = [track.memories[name] for name in track.snapshot.preconditioners]
        flags = [memory.measured for memory in memories if memory.measured is not None]
        if flags:
            track.without_statistics = False
            self._unsettled[track] = (track.snapshot.version, HostCopy([torch.stack(flags).all()]))

    def settle(self, step: int) -> int:
        """Looks, at the end of a step, whether what the ranks made themselves before it had any statistics.

        One step late, so that the host doesn't wait for the device; the same on all ranks, and at the same step.

        Returns:
            In how many block-steps, this one included, gradients were left as they were for want of statistics.
        """
        plain = 0
        for track in [track for track, (version, _) in self._unsettled.items() if version < step]:
            version, measured = self._unsettled.pop(track)
            track.tried(found=bool(measured.wait()[0]))
            if track.without_statistics:
                plain += (step - version + 1) * len(track.group.blocks)
        return plain

    def _note(self, block: BlockName, version: int, outcome: Inversion) -> None:
        """Counts an inversion that didn't go as configured, and says so once per block and outcome."""
        if outcome.outcome is Outcome.DONE:
            return
        self._counters.degraded[str(outcome.outcome)] += 1
        if self._warns and (block, outcome.outcome) not in self._warned:
            self._warned.add((block, outcome.outcome))
            warnings.warn(
                f"block {block!r}, version {version}: {outcome.outcome.message} {outcome.reason}".rstrip(),
                KfdistWarning,
                stacklevel=2,
            )


def _use(track: Track, snapshot: Snapshot) -> None:
    """Puts a snapshot in the place of the last one, with fresh memories unless the method keeps them."""
    before, track.snapshot, track.prepared = track.snapshot.preconditioners, snapshot, None
    for name, preconditioner in snapshot.preconditioners.items():
        track.memories[name].first_use = None
        if not preconditioner.keeps_memory:
            track.memories[name].kept = {}
        elif name in before:
            preconditioner.take_over(before[name], track.memories[name])
    calibrated = any(preconditioner.calibrated for preconditioner in snapshot.preconditioners.values())
    track.calibrations = 0 if calibrated else None


def _shapes(preconditioner: AbstractPreconditioner) -> dict[str, torch.Size]:
    """Returns the shapes of its tensors; another number of ranks gathers another number of rows."""
    return {name: tensor.shape for name, tensor in tensor_fields(preconditioner).items()}

"""What ranks measure of a snapshot while it is in use: EKFAC's scales (George et al., arXiv 1806.03884)."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kfdist.comm.communicator import Communicator
from kfdist.comm.reduce import reduce_flat
from kfdist.curvature.averages import BatchStatistics, decay_at
from kfdist.curvature.blocks import Block
from kfdist.curvature.statistics import Needs, Samples
from kfdist.runtime.in_force import SettingsInForce
from kfdist.runtime.plan.timetable import Timetable
from kfdist.runtime.reduce.example_rows import SampleRequest, local_samples
from kfdist.runtime.track import Track
from kfdist.seeds import block_seed
from kfdist.types import BlockName


class Calibration:
    """Measures what the snapshots in use leave to the ranks. All ranks make the same calls.

    Args:
        tracks: All groups.
        in_force: The settings of the method in force.
        timetable: Says which are folded.
        communicator: Carries the sums.

    Attributes:
        bytes_sent: What this rank contributed.
    """

    def __init__(
        self,
        tracks: Sequence[Track],
        in_force: SettingsInForce,
        timetable: Timetable,
        communicator: Communicator,
    ) -> None:
        self._tracks = [track for track in tracks if _calibrates(track)]
        self._in_force = in_force
        self._timetable = timetable
        self._communicator = communicator
        self._asked: frozenset[int] = frozenset()
        self.bytes_sent = 0

    def ask(self, step: int) -> frozenset[int]:
        """Returns the groups that `step` is to take samples of: the snapshot is new then, or a folding is due."""
        self._asked = frozenset(track.group.index for track in self._tracks if self._may_measure(track, step))
        return self._asked

    def _may_measure(self, track: Track, step: int) -> bool:
        lag = self._in_force.settings.lag
        return (
            self._timetable.folds(track, step)
            or track.calibrations == 0
            or track.ledger.in_flight
            or track.decision(step, self._in_force.settings.adoption).wait
            or (lag is not None and step - lag in track.pending)
        )

    def measure(self, step: int, batches: Mapping[BlockName, BatchStatistics], step_is_finite: Tensor | None) -> None:
        """Measures the snapshots in use at their first step and then at each folding, where `ask` had asked for it.

        Args:
            step: The step.
            batches: This rank's batch.
            step_is_finite: Boolean scalar; where false the samples count for nothing. None: true.
        """
        due = [
            track
            for track in self._tracks
            if track.group.index in self._asked
            and track.calibrations is not None
            and (track.calibrations == 0 or self._timetable.folds(track, step))
        ]
        samples = {
            block.name: self._samples(step, block, needs, batches.get(block.name), step_is_finite)
            for track in due
            for block, needs in ((block, track.group.needs[block.name]) for block in track.group.blocks)
        }
        self.bytes_sent += calibrate(due, samples, self._communicator, ema_decay=self._in_force.settings.ema_decay)

    def _samples(
        self, step: int, block: Block, needs: Needs, batch: BatchStatistics | None, step_is_finite: Tensor | None
    ) -> Samples:
        assert needs.calibration is not None, "every block of a calibrated group has a budget"
        weight = block.parameters()[0]
        request = SampleRequest(
            block=block.name,
            shape=block.shape,
            budget=needs.calibration,
            rows=None if batch is None else batch.samples,
            step_is_finite=step_is_finite,
            destination=None,
            seed=block_seed(self._in_force.settings.seed, block.name, step),
            dtype=torch.float64 if weight.dtype == torch.float64 else torch.float32,
        )
        return local_samples(request, self._communicator, weight.device)


def calibrate(
    tracks: Sequence[Track],
    samples: Mapping[BlockName, Samples],
    communicator: Communicator,
    *,
    ema_decay: float,
) -> int:
    """Sums what the ranks' samples say of the snapshots in use over the ranks and folds it into the blocks' memories.

    The first folding after a snapshot came into use overwrites, the k-th keeps rho_k = min(1 - 1/k, ema_decay). All
    ranks must call it with the same groups.

    Args:
        tracks: The groups to calibrate; those whose snapshot isn't calibrated are left alone.
        samples: This rank's samples of this step by block.
        communicator: Carries the sums.
        ema_decay: Largest rho.

    Returns:
        Bytes that this rank contributed.
    """
    found = []
    for track in tracks:
        if track.calibrations is None:
            continue
        track.calibrations += 1
        rho = decay_at(track.calibrations, ema_decay)
        for block in track.group.blocks:
            preconditioner = track.snapshot.preconditioners[block.name]
            found.append((track.memories[block.name].kept, rho, preconditioner.calibration_sums(samples[block.name])))
    if not found:
        return 0
    pieces = [piece for _, _, sums in found for piece in sums.values()]
    reduced = iter(reduce_flat(pieces, communicator))
    for kept, rho, sums in found:
        for key in sums:
            new = next(reduced) * (1.0 - rho)
            kept[key] = new if key not in kept else torch.add(new, kept[key], alpha=rho)
    return sum(piece.numel() * piece.element_size() for piece in pieces)


def _calibrates(track: Track) -> bool:
    return any(needs.calibration is not None for needs in track.group.needs.values())

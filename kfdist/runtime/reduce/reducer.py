"""The reduce verb: from each rank's sums and rows to those of all ranks together."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kfdist.comm.communicator import Communicator
from kfdist.comm.reduce import reduce_flat
from kfdist.curvature.averages import BatchStatistics, WeightedSums, all_finite, decay_at, sum_shapes
from kfdist.curvature.gradient_sums import GradientSums
from kfdist.curvature.inverter import Coupling
from kfdist.curvature.statistics import Samples
from kfdist.runtime.plan.groups import BlockGroup
from kfdist.runtime.plan.timetable import Due, Timetable
from kfdist.runtime.reduce.contributions import (
    Contribution,
    contribution_of_sums,
    reduce_contributions,
    with_increment,
)
from kfdist.runtime.reduce.example_rows import SampleExchange, SampleRequest
from kfdist.runtime.reduce.gradient_moments import GradientMomentSums
from kfdist.runtime.settings import Settings
from kfdist.runtime.track import Track
from kfdist.seeds import block_seed, rank_seed
from kfdist.types import BlockName


@dataclass(frozen=True, kw_only=True)
class Reduction:
    """The statistics of the groups that were due, reduced over the ranks.

    Attributes:
        step: The step.
        tracks: The groups.
        sums: By block, the summed tensors by name, where this rank needs them.
        samples: By block, the rows of all ranks, where this rank needs them.
    """

    step: int
    tracks: Sequence[Track]
    sums: Mapping[BlockName, Mapping[str, Tensor]]
    samples: Mapping[BlockName, Samples]


class StatisticsReducer:
    """This rank's sums, and their reduction when they are due. All ranks make the same calls.

    Args:
        groups: All groups.
        settings: What the pipeline is told.
        timetable: Counts the foldings.
        communicator: Carries sums and rows.
        device: Where the statistics live.

    Attributes:
        sums: This rank's (S, w) by block, of those that are captured.
        moments: Of those whose methods measure gradients alone.
    """

    def __init__(
        self,
        groups: Sequence[BlockGroup],
        settings: Settings,
        timetable: Timetable,
        communicator: Communicator,
        device: torch.device,
    ) -> None:
        self.sums = empty_sums(groups, device)
        self.moments = GradientMomentSums(groups, communicator.rank, device)
        self._settings = settings
        self._timetable = timetable
        self._communicator = communicator
        self._samples = SampleExchange(communicator, device)
        self._sums_sent = 0

    def fold(self, due: Due, batches: Mapping[BlockName, BatchStatistics], step_is_finite: Tensor | None) -> None:
        """Folds this rank's batch, and the gradients, into the sums that are due.

        Args:
            due: What is due.
            batches: This rank's batch, by block; sums that are folded go, as they may be as large as the averages.
            step_is_finite: Boolean scalar; where false nothing changes. None: true.
        """
        self.moments.fold(due.folding, self._settings.ema_decay, step_is_finite)
        for track in due.folding:
            if track.group.of_gradients:
                continue
            rho = decay_at(self._timetable.foldings_until(track, due.step), self._settings.ema_decay)
            for block in track.group.blocks:
                batch = batches.get(block.name)
                if batch is None and block.frozen:
                    continue  # the average stays as it is, and its weight doesn't fade away
                online = track.group.inverter.online  # whose rows are good if the batch's sums, left as they are, are
                self.sums[block.name].fold(batch, rho, step_is_finite, takes_over=not online)
                if batch is not None and not online:
                    batch.sums, batch.thin = {}, {}

    def reduce(
        self, due: Due, batches: Mapping[BlockName, BatchStatistics], step_is_finite: Tensor | None
    ) -> Reduction:
        """Sums over the ranks what is due: the folded sums, and this batch's rows.

        Args:
            due: What is due.
            batches: This rank's batch, by block; its sums, which are folded, go: they may be as large as the inversion.
            step_is_finite: Boolean scalar; where false rows count for nothing. None: true.
        """
        captured = [track for track in due.reducing if not track.group.of_gradients]
        step, groups = due.step, [track.group for track in captured]
        contributions = [
            self._contribution(step, track, name, batches.get(name), step_is_finite)
            for track in captured
            for name in track.group.needs
        ]
        for batch in batches.values():
            batch.sums, batch.thin = {}, {}
        rank = self._communicator.rank
        mine = {name for group in groups if group.own or group.courier_rank == rank for name in group.needs}
        reduced, sent = reduce_contributions(contributions, self._communicator, wanted=mine.__contains__)
        self._sums_sent += sent
        requests = self._sample_requests(step, groups, batches, step_is_finite)
        samples = self._samples.gather(requests) if requests else {}
        sums = {**reduced, **self.moments.due(due.reducing)}
        return Reduction(step=step, tracks=due.reducing, sums=sums, samples=samples)

    @property
    def bytes_sent(self) -> int:
        """Bytes of the sums and rows that this rank contributed."""
        return self._sums_sent + self._samples.bytes_sent

    @property
    def every(self) -> list[WeightedSums | GradientSums]:
        """This rank's sums of both kinds."""
        return [*self.sums.values(), *self.moments.sums.values()]

    def average(self) -> None:
        """Collective: every rank's sums become the mean of all ranks' sums, so that any rank's state speaks for all."""
        self.moments.share(self._communicator)
        states = [sums.state_dict() for sums in self.sums.values()]
        if not states:
            return
        reduced = iter(reduce_flat([piece for state in states for piece in state.values()], self._communicator))
        for sums, state in zip(self.sums.values(), states, strict=True):
            sums.load_state_dict({name: next(reduced) / self._communicator.world_size for name in state})

    def state_dict(self) -> dict[str, Any]:
        """Returns this rank's sums, and how many positions its rows have room for."""
        return {
            **self.moments.state_dict(),
            "sums": {name: sums.state_dict() for name, sums in self.sums.items()},
            "frames": dict(self._samples.frames),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` returned."""
        for name, sums in self.sums.items():
            sums.load_state_dict(state["sums"][name])
        self.moments.load_state_dict(state)
        self._samples.frames.update({name: int(size) for name, size in state["frames"].items()})

    def _contribution(
        self,
        step: int,
        track: Track,
        name: BlockName,
        batch: BatchStatistics | None,
        step_is_finite: Tensor | None,
    ) -> Contribution:
        group, sums = track.group, self.sums[name]
        statistic, needs = group.inverter.statistic, group.needs[name]
        if not group.inverter.online:
            return contribution_of_sums(name, statistic, sums)
        dense = Contribution(block=name, statistic=statistic, summed={}, like=sums.like)
        if self._timetable.inverts(track, step):
            dense = contribution_of_sums(name, statistic, sums)
        if batch is not None and batch.rows:
            _count_dropped(sums, batch.rows.values())
        block = next(block for block in group.blocks if block.name == name)
        shape, rests = block.shape, batch is None and block.frozen
        return with_increment(
            dense,
            needs,
            {"A": (shape.groups, shape.d_in), "G": (shape.groups, shape.d_out)},
            batch,
            rho=1.0 if rests else decay_at(self._timetable.updates_until(track, step), self._settings.ema_decay),
            step_is_finite=step_is_finite,
            like=sums.like,
            rank=self._communicator.rank,
            world_size=self._communicator.world_size,
            seed=self._own_seed(name, step),
        )

    def _sample_requests(
        self,
        step: int,
        groups: Sequence[BlockGroup],
        batches: Mapping[BlockName, BatchStatistics],
        step_is_finite: Tensor | None,
    ) -> list[SampleRequest]:
        requests = []
        for group in groups:
            everyone = group.own
            for block in group.blocks:
                budget, batch = group.needs[block.name].samples, batches.get(block.name)
                if budget is None:
                    continue
                if batch is not None and batch.samples is not None:
                    _count_dropped(self.sums[block.name], (batch.samples.a, batch.samples.g))
                requests.append(
                    SampleRequest(
                        block=block.name,
                        shape=block.shape,
                        budget=budget,
                        rows=None if batch is None else batch.samples,
                        step_is_finite=step_is_finite,
                        destination=None if everyone else group.courier_rank,
                        seed=self._own_seed(block.name, step),
                        dtype=self.sums[block.name].like.dtype,
                    )
                )
        return requests

    def _own_seed(self, name: BlockName, step: int) -> int:
        return rank_seed(block_seed(self._settings.seed, name, step), self._communicator.rank)


def _count_dropped(sums: WeightedSums, rows: Iterable[Tensor]) -> None:
    """Counts a batch whose rows are non-finite, where no folding of sums does."""
    if not sums.sums:
        sums.dropped.add_((~all_finite(rows)).to(sums.dropped.dtype))


def empty_sums(groups: Iterable[BlockGroup], device: torch.device) -> dict[BlockName, WeightedSums]:
    """Makes the sums of all blocks that are captured: float64 for float64 parameters, else float32."""
    sums = {}
    for group in (group for group in groups if not group.of_gradients):
        chained = group.inverter.coupling is Coupling.CHAIN
        for position, block in enumerate(group.blocks):
            following = group.blocks[position + 1].shape if chained and position + 1 < len(group.blocks) else None
            shapes = sum_shapes(block.shape, group.needs[block.name], following=following, members=len(group.blocks))
            dtype = torch.float64 if block.parameters()[0].dtype == torch.float64 else torch.float32
            sums[block.name] = WeightedSums(shapes, dtype=dtype, device=device, routed=block.routed)
    return sums

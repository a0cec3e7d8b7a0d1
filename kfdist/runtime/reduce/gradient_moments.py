"""The moments of gradients that the ranks share already: kept by each group's courier rank alone, never reduced."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from kfdist.comm.communicator import Communicator
from kfdist.comm.reduce import reduce_flat
from kfdist.curvature.averages import sum_shapes
from kfdist.curvature.blocks.whole import TensorBlock, as_tensors
from kfdist.curvature.gradient_inverter import AbstractGradientInverter
from kfdist.curvature.gradient_sums import GradientSums
from kfdist.runtime.plan.groups import BlockGroup
from kfdist.runtime.track import Track
from kfdist.types import BlockName


class GradientMomentSums:
    """The sums of the blocks whose methods measure gradients alone.

    After their reduction all ranks have the same gradients, so a group's courier rank, which ships the statistics,
    sums them by itself; other ranks hold nothing.

    Args:
        groups: All groups.
        rank: This rank.
        device: Where the gradients are.

    Attributes:
        sums: Of the blocks that this rank ships, by name.
    """

    def __init__(self, groups: Iterable[BlockGroup], rank: int, device: torch.device) -> None:
        self._groups = [group for group in groups if group.of_gradients]
        mine = [group for group in self._groups if group.courier_rank == rank]
        self.sums = empty_gradient_sums(mine, device)
        self._device = device
        self._copies: dict[BlockName, Mapping[str, Tensor]] = {}

    def fold(self, folding: Iterable[Track], ema_decay: float, step_is_finite: Tensor | None) -> None:
        """Folds this step's gradients, as they are in `.grad`, into the sums that are due.

        Args:
            folding: The groups that are due.
            ema_decay: rho, where the method has none of its own.
            step_is_finite: Boolean scalar; where false nothing changes. None: true.

        Raises:
            KfdistError: A gradient is sparse.
        """
        self._copies = {}
        for track in folding:
            inverter = track.group.inverter
            for block in track.group.blocks:
                if isinstance(block, TensorBlock):
                    block.refuse_sparse()  # on all ranks, so that none waits for one that raised
                if block.name in self.sums and isinstance(inverter, AbstractGradientInverter):
                    moments = None
                    if block.frozen and not block.takes_part:
                        continue  # as `StatisticsReducer.fold` has it
                    if block.takes_part:
                        tensor = as_tensors(block.gradient(copied=False), block.shape.modes)
                        in_use = track.snapshot.preconditioners.get(block.name)
                        moments = inverter.moments(tensor, in_use, track.memories[block.name])
                    self.sums[block.name].fold(moments, inverter.decay(ema_decay), step_is_finite)

    def due(self, reducing: Iterable[Track]) -> dict[BlockName, dict[str, Tensor]]:
        """Returns the sums of the due groups that this rank ships, by block: what a reduction would have given."""
        names = [block.name for track in reducing for block in track.group.blocks]
        return {name: self.sums[name].packed() for name in names if name in self.sums}

    def share(self, communicator: Communicator) -> None:
        """Collective: until the next folding, every rank's state has the sums of all blocks."""
        if not self._groups or communicator.world_size == 1:
            return
        empty = empty_gradient_sums(self._groups, self._device)
        states = {name: (self.sums[name] if name in self.sums else sums).state_dict() for name, sums in empty.items()}
        pieces = iter(reduce_flat([piece for state in states.values() for piece in state.values()], communicator))
        self._copies = {name: {key: next(pieces) for key in state} for name, state in states.items()}

    def state_dict(self) -> dict[str, Any]:
        """Returns this rank's sums or, after `share`, all of them."""
        return {"moments": {**self._copies, **{name: sums.state_dict() for name, sums in self.sums.items()}}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` returned on the ranks that shipped these blocks, or after `share`."""
        for name, sums in self.sums.items():
            sums.load_state_dict(state["moments"][name])


def empty_gradient_sums(groups: Iterable[BlockGroup], device: torch.device) -> dict[BlockName, GradientSums]:
    """Makes the sums of some groups' blocks: float64 for float64 parameters, else float32."""
    found = {}
    for group in groups:
        for block in group.blocks if group.of_gradients else ():
            dtype = torch.float64 if block.parameters()[0].dtype == torch.float64 else torch.float32
            shapes = sum_shapes(block.shape, group.needs[block.name])
            found[block.name] = GradientSums(shapes, block.shape.groups, dtype=dtype, device=device)
    return found

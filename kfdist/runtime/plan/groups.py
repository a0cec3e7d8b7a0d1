"""Groups of blocks, the unit of phase, version and adoption, and what they ask of a run."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from kfdist.curvature.blocks import Block
from kfdist.curvature.inverter import Coupling
from kfdist.curvature.inverters import AbstractInverter
from kfdist.curvature.statistics import Needs
from kfdist.errors import ConfigError
from kfdist.types import BlockName, Fisher, GroupName, GroupSpec


@dataclass(frozen=True, kw_only=True)
class BlockGroup:
    """The unit of phase, version and adoption.

    Attributes:
        index: Place in the model's order, from 0; its column in the table.
        name: Unique name; a single block's own.
        blocks: The blocks inverted together.
        inverter: What inverts them.
        needs: What is measured of each block.
        courier_rank: The rank that ships their statistics and announces their results.
        spec: The group as the assignment sees it.
    """

    index: int
    name: GroupName
    blocks: tuple[Block, ...]
    inverter: AbstractInverter
    needs: Mapping[BlockName, Needs]
    courier_rank: int
    spec: GroupSpec

    @property
    def coupled(self) -> bool:
        """Whether its blocks are measured and applied together."""
        return self.inverter.coupling is not Coupling.NONE


def check_fisher(fisher: Fisher, groups: Iterable[BlockGroup]) -> None:
    """Refuses methods that take single examples' rows together with the exact Fisher, which sums over all targets."""
    if fisher != "exact":
        return
    for group in groups:
        for needs in group.needs.values():
            if needs.increments or needs.samples is not None or needs.calibration is not None:
                raise ConfigError(
                    f"{group.inverter.name} takes rows of single examples, which fisher='exact' doesn't have; use "
                    "fisher='mc' or 'empirical'",
                    path="fisher",
                )


def check_applied_rows(
    groups: Iterable[BlockGroup], *, world_size: int, fisher: Fisher, grad_scaler: torch.amp.GradScaler | None
) -> None:
    """Refuses to multiply inverses onto rows where the gradient isn't the batch's own, by `ConfigError`."""
    group = next((group for group in groups if any(needs.applied_rows for needs in group.needs.values())), None)
    if group is None:
        return
    against = None
    if world_size > 1:
        against = f"the gradients of {world_size} ranks are averaged"
    elif fisher != "empirical":
        against = f"fisher = {fisher!r} measures other gradients than the loss's own"
    elif grad_scaler is not None and grad_scaler.is_enabled():
        against = "a GradScaler scales the gradients"
    if against is not None:
        raise ConfigError(
            f'apply_to = "rows" of {group.inverter.name} (block {group.name!r}) needs the raw gradient of one batch, '
            f'but {against}; use apply_to = "gradient"',
            path="method",
        )

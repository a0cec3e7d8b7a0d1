"""Groups of blocks, the unit of phase, version and adoption, and what they ask of a run."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from kfdist.curvature.blocks import Block
from kfdist.curvature.gradient_inverter import AbstractGradientInverter
from kfdist.curvature.inverter import Coupling, Placement
from kfdist.curvature.inverters import AbstractInverter
from kfdist.curvature.statistics import MeanVectors, Needs
from kfdist.errors import ConfigError
from kfdist.types import BlockName, Fisher, GroupName, GroupSpec


@dataclass(frozen=True, kw_only=True)
class BlockGroup:
    """The unit of phase, version and adoption.

    Attributes:
        index: Place in the model's order, from 0.
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
    def own(self) -> bool:
        """Whether every rank inverts it for itself: no job, no owner, no column in the ranks' table."""
        return self.inverter.placement is Placement.WORKER

    @property
    def of_gradients(self) -> bool:
        """Whether it is measured by the gradients that all ranks share, and nothing of it is captured."""
        return isinstance(self.inverter, AbstractGradientInverter)

    @property
    def obeys_damping(self) -> bool:
        """Whether its directions obey lambda at each step; else that was fixed at the inversion, or there is none."""
        return self.inverter.produces.damping_at_apply and self.inverter.produces.solves

    @property
    def coupled(self) -> bool:
        """Whether its blocks are measured and applied together."""
        return self.inverter.coupling is not Coupling.NONE


_FEW = 1 << 19
"""Numbers in the factors of a small model: as many as in those of one layer of 512, which fold at one step anyway."""


def are_small(groups: Iterable[BlockGroup]) -> bool:
    """Says whether all of a model's blocks cost about what a step that measures costs besides, its hooks and its start.

    Only of methods whose directions have Adam's size: for these it is shown that which batches are measured is no
    matter for progress (docs/performance.md, "A step beside SGD's").
    """
    groups = list(groups)
    shapes = [block.shape for group in groups for block in group.blocks]
    numbers = sum(shape.groups * (shape.d_in**2 + shape.d_out**2) for shape in shapes)
    alike = all(group.inverter.produces.normalised and not group.of_gradients for group in groups)
    return bool(groups) and alike and numbers <= _FEW


def check_fisher(fisher: Fisher, groups: Iterable[BlockGroup]) -> None:
    """Refuses methods that take of the output gradients what the Fisher matrix of predictions doesn't have.

    Single examples' rows, where the exact one sums over all targets; and mean gradients, which are zero but for noise
    over targets that the model itself draws.
    """
    for group in groups if fisher != "empirical" else ():
        if group.inverter.statistic is MeanVectors:
            raise ConfigError(
                f"{group.inverter.name} takes the mean of the output gradients, which is zero over the targets that "
                f"fisher={fisher!r} takes from the model's own predictions; use fisher='empirical'",
                path="fisher",
            )
    for group in groups if fisher == "exact" else ():
        for needs in group.needs.values():
            if needs.increments or needs.samples is not None or needs.calibration is not None:
                raise ConfigError(
                    f"{group.inverter.name} takes rows of single examples, which fisher='exact' doesn't have; use "
                    "fisher='mc' or 'empirical'",
                    path="fisher",
                )


def refuse_applied_rows(groups: Iterable[BlockGroup], reason: str) -> None:
    """Refuses methods that multiply their inverse onto the batch's rows, since they aren't those of the gradient.

    Args:
        groups: All groups.
        reason: Why they aren't.

    Raises:
        ConfigError: There is such a method.
    """
    for group in groups:
        if any(needs.applied_rows for needs in group.needs.values()):
            raise ConfigError(
                f'apply_to = "rows" of {group.inverter.name} (block {group.name!r}) needs the raw gradient of one '
                f'batch, but {reason}; use apply_to = "gradient"',
                path="method",
            )

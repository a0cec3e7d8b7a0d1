"""The inversion of one block that is its own group."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from kfdist.curvature.inverter import AbstractInverter
from kfdist.curvature.ladder import BlockOutcome, invert_group_with_ladder


def invert_with_ladder(
    inverter: AbstractInverter, statistics: Any, *, damping: float, previous: Mapping[str, Tensor], seed: int
) -> BlockOutcome:
    """Inverts one block; see `invert_group_with_ladder`."""
    outcomes = invert_group_with_ladder(
        inverter, {"": statistics}, damping=damping, previous={"": previous}, seeds={"": seed}
    )
    return outcomes[""]

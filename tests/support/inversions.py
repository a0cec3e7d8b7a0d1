"""The inversion of one block that is its own group, and the journey of what comes of it."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from kfdist.curvature.inverter import AbstractInverter, Inversion
from kfdist.curvature.inverters import PRECONDITIONERS
from kfdist.curvature.ladder import invert_group_with_ladder
from kfdist.wire.records import from_tree, to_tree


def invert_with_ladder(
    inverter: AbstractInverter, statistics: Any, *, damping: float, previous: Mapping[str, Tensor], seed: int
) -> Inversion:
    """Inverts one block; see `invert_group_with_ladder`."""
    outcomes = invert_group_with_ladder(
        inverter, {"": statistics}, damping=damping, previous={"": previous}, seeds={"": seed}
    )
    return outcomes[""]


def travelled(preconditioner: object, **fields: Any) -> Any:
    """Returns what a reader makes of the record when these of its fields were changed on the way."""
    tree = to_tree(preconditioner, PRECONDITIONERS)
    return from_tree({**tree, "fields": {**tree["fields"], **fields}}, PRECONDITIONERS)

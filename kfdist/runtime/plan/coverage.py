"""What preconditions each parameter of a model, or why nothing does."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from kfdist.runtime.plan.groups import BlockGroup
from kfdist.runtime.plan.layers import named_layers
from kfdist.types import BlockName


@dataclass(frozen=True, kw_only=True)
class CoverageRow:
    """What happens to one parameter.

    Attributes:
        parameter: Its dotted name.
        block: The block that preconditions it, or None.
        method: The block's inverter, or None.
        reason: Why it has no block; else what the method does with it and why it was chosen, where that says more
            than its name.
        inversion: How the inversion in use went; empty before the first one, and where ranks invert for themselves.
            Not compared: it tells of one moment.
    """

    parameter: str
    block: str | None
    method: str | None
    reason: str
    inversion: str = field(default="", compare=False)


@dataclass(frozen=True)
class Coverage:
    """Every parameter of a model and what preconditions it; `str()` gives a table."""

    rows: tuple[CoverageRow, ...]

    def with_inversions(self, notes: Mapping[BlockName, str]) -> "Coverage":
        """Returns the same with a note on the inversion of each block that has one."""
        return Coverage(tuple(replace(row, inversion=notes.get(row.block or "", "")) for row in self.rows))

    def __str__(self) -> str:
        width = max((len(row.parameter) for row in self.rows), default=0)
        return "\n".join(
            f"{row.parameter:<{width}}  {row.method or '-':<16}  "
            + ": ".join(filter(None, (row.block, row.reason, row.inversion)))
            for row in self.rows
        )


def coverage_of(model: nn.Module, groups: Sequence[BlockGroup], reasons: Mapping[str, str]) -> Coverage:
    """Lists every parameter; `reasons` say why a layer has no block, or what there is to say of its block."""
    by_parameter = {
        id(parameter): (block.name, group.inverter.name)
        for group in groups
        for block in group.blocks
        for parameter in block.parameters()
    }
    rows, seen = [], set()
    for layer, module in named_layers(model):
        for own_name, parameter in module.named_parameters(layer, recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            block, method = by_parameter.get(id(parameter), (None, None))
            has_block = any(name == layer for name, _ in by_parameter.values())
            left_out = "its layer's block leaves it out"
            reason = reasons.get(block, "") if block else left_out if has_block else reasons.get(layer, left_out)
            rows.append(CoverageRow(parameter=own_name, block=block, method=method, reason=reason))
    return Coverage(tuple(rows))

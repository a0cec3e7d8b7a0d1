"""What preconditions each parameter of a model, or why nothing does."""

import re
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace

from torch import nn
from torch.nn.parameter import UninitializedParameter

from kfdist.capture.unmeasured import UNSEEN
from kfdist.curvature.blocks import Block
from kfdist.curvature.by_width import BARE, FIRST_ORDER
from kfdist.runtime.plan.groups import BlockGroup
from kfdist.runtime.plan.layers import bare_parameters, named_layers
from kfdist.types import BlockName

NO_METHOD = 'method "none" leaves it to the optimizer'
SKIPPED = "skipped by configuration"
UNMATCHED = "no pattern of the method table matches"
WITHOUT_MOMENTS = "left to the optimizer: directions of a table or norm don't have the size of Adam's"
VECTOR = "left to the optimizer: a vector; the method's `vectors` takes them too"
SCALAR = "left to the optimizer: a single number, of which there are no moments"
_WANTED = frozenset({NO_METHOD, SKIPPED, UNMATCHED, FIRST_ORDER, WITHOUT_MOMENTS, VECTOR, SCALAR, BARE})
"""Reasons that the user gave."""

_MULTIPLIED = (
    "left to a first-order method: a product with it, or with what is made of it, was seen, and none is found in its "
    "module's code; methods on gradients (soap, shampoo) take it by its name"
)
_ADDED = "it was added after the Preconditioner was made; close that and make a new one"
_TRAINED_LATER = (
    "it was frozen, or had no values, when the Preconditioner was made, and has no block: freeze layers after that; or "
    "close it now and make a new one, whose statistics begin anew"
)
_MOST_NAMES_SHOWN = 5
"""Of one reason in a warning."""

_NUMBER = re.compile(r"(?<![^.])[0-9]+(?![^.])")
"""A number between dots: which one it is of several layers."""


@dataclass(frozen=True)
class CoverageRow:
    """What happens to one parameter, or to the part of it that belongs to one block.

    Attributes:
        parameter: Its dotted name.
        elements: How many trained numbers that is; 0 where it is frozen, or lazy and not yet initialised.
        block: The block that preconditions it, or None.
        method: The block's inverter, or None.
        reason: Why it has no block; else what the method does with it and why it was chosen, where that says more
            than its name.
        frozen: How many numbers it is where it is frozen (requires_grad is False); else 0.
        inversion: How the inversion in use went, or why the block isn't measured, or not in all its uses; empty before
            the first one, and where ranks invert for themselves. Not compared: it tells of one moment.
        measured: Whether its block, if it has one, was measured or hasn't been due yet. Not compared either.
        in_part: Whether its block was also used in a way that isn't measured. Not compared either.
    """

    parameter: str
    elements: int
    block: str | None
    method: str | None
    reason: str
    frozen: int = 0
    inversion: str = field(default="", compare=False)
    measured: bool = field(default=True, compare=False)
    in_part: bool = field(default=False, compare=False)

    def as_of_now(self, parameter: nn.Parameter) -> "CoverageRow":
        """Returns the same as the parameter is trained or frozen by now."""
        if self.elements if parameter.requires_grad else self.frozen:
            return self
        numbers = self.elements + self.frozen or parameter.numel()
        if not parameter.requires_grad:
            return replace(self, elements=0, frozen=numbers)
        later = self.block is None and numbers and self.reason not in _WANTED
        return replace(self, elements=numbers, frozen=0, reason=_TRAINED_LATER if later else self.reason)


@dataclass(frozen=True)
class Coverage:
    """Every parameter of a model and what preconditions it; `str()` gives a table.

    Attributes:
        rows: One or more a parameter.
        mask: What is known of `batch`'s masks, as far as it has come from the device: how much they left out; empty
            where there are none. Not compared.
    """

    rows: tuple[CoverageRow, ...]
    mask: str = field(default="", compare=False)

    @property
    def trained(self) -> int:
        """How many numbers are trained."""
        return sum(row.elements for row in self.rows)

    @property
    def frozen(self) -> int:
        """How many numbers are frozen, with a block or without."""
        return sum(row.frozen for row in self.rows)

    @property
    def share(self) -> float:
        """Share of the trained numbers that a block preconditions by all of its uses, in [0, 1]."""
        return self._share(row for row in self.rows if row.block is not None and row.measured and not row.in_part)

    @property
    def share_in_part(self) -> float:
        """Share of those that a block preconditions by some of its uses, since the others can't be measured."""
        return self._share(row for row in self.rows if row.in_part)

    def _share(self, rows: Iterable[CoverageRow]) -> float:
        return sum(row.elements for row in rows) / max(self.trained, 1)

    def without_biases(self, blocks: Iterable[Block], reasons: Mapping[BlockName, str]) -> "Coverage":
        """Returns the same where some blocks, for the reasons given, leave out the bias that they were planned with."""
        biases = {
            (block.name, f"{block.layer}.{part.attribute}".lstrip(".")): reasons[block.name]
            for block in blocks
            if block.name in reasons
            for part in block.planned_parts[1:]
        }
        found = [(row, biases.get((row.block or "", row.parameter))) for row in self.rows]
        return Coverage(
            tuple(row if why is None else replace(row, block=None, method=None, reason=why) for row, why in found)
        )

    def with_inversions(
        self, notes: Mapping[BlockName, str], unmeasured: Mapping[BlockName, str], unseen: Set[BlockName]
    ) -> "Coverage":
        """Returns the same with a note on the inversion of each block that has one.

        Args:
            notes: By block.
            unmeasured: Why blocks that were due weren't measured, or not in all their uses.
            unseen: Those of them that have no statistics at all.
        """

        def now(row: CoverageRow, block: BlockName) -> CoverageRow:
            if block in unseen:
                return replace(row, inversion=f"not measured: {unmeasured[block]}", measured=False)
            if block in unmeasured:
                return replace(row, inversion=f"in part: {unmeasured[block]}", in_part=True)
            return replace(row, inversion=notes.get(block, ""))

        return Coverage(tuple(row if row.block is None else now(row, row.block) for row in self.rows))

    def as_of_now(self, model: nn.Module, multiplied: Set[int] = frozenset()) -> "Coverage":
        """Returns the same with what is trained and frozen by now, and with parameters that were added.

        Args:
            model: The bare model.
            multiplied: The parameters, by id, that went into products so far.
        """
        names: dict[nn.Parameter, list[str]] = {}
        for name, parameter in bare_parameters(model):
            if not isinstance(parameter, UninitializedParameter):
                names.setdefault(parameter, []).append(name)
        parameters = {name: parameter for parameter, found in names.items() for name in found}
        rows = [row.as_of_now(parameters[row.parameter]) if row.parameter in parameters else row for row in self.rows]
        rows = [
            replace(row, reason=_MULTIPLIED)
            if row.reason == BARE and id(parameters.get(row.parameter)) in multiplied
            else row
            for row in rows
        ]
        known = {row.parameter for row in self.rows}
        rows += [
            CoverageRow(found[0], parameter.numel(), None, None, _ADDED).as_of_now(parameter)
            for parameter, found in names.items()
            if known.isdisjoint(found)
        ]
        return replace(self, rows=tuple(rows))

    def left_out(self) -> dict[str, str]:
        """Returns why trained parameters, or parts of them, have no block, but for those that the user left out."""
        return {
            row.parameter: row.reason
            for row in self.rows
            if row.block is None and row.elements and row.reason not in _WANTED
        }

    def __str__(self) -> str:
        width = max((len(row.parameter) for row in self.rows), default=0)
        lines = [
            f"{row.parameter:<{width}}  {row.method or '-':<16}  "
            + ": ".join(filter(None, (row.block, "frozen" if row.frozen else "", row.reason, row.inversion)))
            for row in self.rows
        ]
        more = f", {self.share_in_part:.2%} more by a part of their uses" if self.share_in_part else ""
        more += f"; {self.frozen:,} more are frozen" if self.frozen else ""
        lines.append(f"{self.share:.2%} of {self.trained:,} trained parameters are preconditioned{more}")
        return "\n".join([*lines, self.mask] if self.mask else lines)


def coverage_of(model: nn.Module, groups: Sequence[BlockGroup], reasons: Mapping[str, str]) -> Coverage:
    """Lists every parameter; `reasons` say why a layer has no block, or what there is to say of its block."""
    methods = {block.name: group.inverter.name for group in groups for block in group.blocks}
    by_parameter: dict[int, list[tuple[str, int]]] = {}
    with_blocks = set()
    for group in groups:
        for block in group.blocks:
            with_blocks.add(block.layer)
            for part in block.parts:
                elements = part.of(part.parameter).numel()
                by_parameter.setdefault(id(part.parameter), []).append((block.name, elements))
    rows, seen = [], set()
    for layer, module in named_layers(model):
        for own_name, parameter in module.named_parameters(layer, recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            lazy = isinstance(parameter, UninitializedParameter)
            left = 0 if lazy else parameter.numel()
            found = []
            for block, elements in by_parameter.get(id(parameter), ()):
                left -= elements
                found.append(CoverageRow(own_name, elements, block, methods[block], reasons.get(block, "")))
            if id(parameter) not in by_parameter:
                left_out = "its layer's block leaves it out"
                reason = reasons.get(own_name) or (left_out if layer in with_blocks else reasons.get(layer, left_out))
                found.append(CoverageRow(own_name, left, None, None, reason))
            elif left > 0:
                found.append(CoverageRow(own_name, left, None, None, "the rest of it belongs to no block"))
            rows += found if lazy else [row.as_of_now(parameter) for row in found]
    return Coverage(tuple(rows))


def left_out_warning(reasons: Mapping[str, str], share: float, instead: str) -> str:
    """Says that trained parameters have no block, and why; `share` is that of what is preconditioned.

    What becomes of the others is said in `instead`.
    """
    return (
        f"{len(reasons)} parameters have gradients and no block: {_listed(reasons)}. {instead}; "
        f"{share:.2%} of the trained numbers are preconditioned, see coverage(). `skip` says that this is wanted"
    )


def _listed(reasons: Mapping[str, str]) -> str:
    """Lists names by their reason, several of one kind (`layers.0.scale`, `layers.1.scale`) as one glob."""
    by_reason: dict[str, dict[str, list[str]]] = {}
    for name, reason in sorted(reasons.items()):
        kind = _NUMBER.sub("*", name)
        by_reason.setdefault(reason, {}).setdefault(kind, []).append(name)
    return "; ".join(f"{_shown(kinds)}: {reason}" for reason, kinds in by_reason.items())


def _shown(kinds: Mapping[str, Sequence[str]]) -> str:
    shown = []
    for kind, names in kinds.items():
        several = len(names) > 1 and any(part != "*" for part in kind.split("."))
        shown += [f"{kind!r} ({len(names)})"] if several else [repr(name or "the model") for name in names]
    return ", ".join(shown[:_MOST_NAMES_SHOWN] + ["..."] * (len(shown) > _MOST_NAMES_SHOWN))


def unmeasured_warning(reasons: Mapping[BlockName, str], step: int) -> str:
    """Says that blocks were due and not measured, or not all of their uses, and why."""
    when = (
        "A use is seen inside a module of the model that is in training mode, with gradients on, outside of paused(). "
        if any(reason.endswith(UNSEEN) for reason in reasons.values())
        else ""
    )
    return (
        f"{len(reasons)} of the blocks were due at step {step} and have gradients, but not all their uses were "
        f"measured: {_listed(reasons)}. {when}What isn't measured keeps its plain gradients, or an old inverse, and "
        "coverage() doesn't count it; `skip` leaves it out for good"
    )

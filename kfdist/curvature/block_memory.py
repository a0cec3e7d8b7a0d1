"""What a rank keeps of one block from step to step, beside the inverse in use."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Bool
from torch import Tensor

_Form = TypeVar("_Form")


@dataclass(frozen=True)
class Prepared:
    """What was worked out of an inverse for some values, such as a damping, to be multiplied again and again."""

    inverse: object
    values: tuple[object, ...]
    form: Any

    def holds(self, inverse: object, values: tuple[object, ...]) -> bool:
        """Says whether it is of this inverse and these numbers and tensors; a tensor is known by its identity."""
        return self.inverse is inverse and all(
            old is new or (not isinstance(new, Tensor) and old == new)
            for old, new in zip(self.values, values, strict=True)
        )


@dataclass
class BlockMemory:
    """What a rank keeps of one block from step to step beside the frozen snapshot; equal on all ranks, checkpointed.

    What is `prepared` isn't: it follows from the rest, bit for bit.

    Attributes:
        kept: What the method keeps, by name: scales, the last solution.
        measured: Whether any rank ever had statistics of it, a boolean scalar; None unless ranks invert it themselves.
        counts: Directions that `apply` replaced, by reason: integer scalars, which telemetry sums over the blocks.
        first_use: <U, V> at the first step on which the inverse in use met a gradient, a scalar; None before it.
        learns: Whether the gradient that meets the inverse next is a step's own, from which methods with moments learn;
            a boolean scalar where only the device knows whether the step will be skipped.
        steady: Whether the damping stays as it is from step to step, so that preparing for it may take time.
        prepared: What was worked out of the inverse in use.
    """

    kept: dict[str, Tensor] = field(default_factory=dict)
    measured: Tensor | None = None
    counts: dict[str, Tensor] = field(default_factory=dict)
    first_use: Tensor | None = None
    learns: Tensor | bool = False
    steady: bool = False
    prepared: Prepared | None = field(default=None, repr=False, compare=False)

    def form(self, inverse: object, make: Callable[[], _Form], *values: object) -> _Form:
        """Returns what `make` makes of an inverse and some values, made again where one of them has changed."""
        values = (self.steady, *values)
        if self.prepared is None or not self.prepared.holds(inverse, values):
            self.prepared = Prepared(inverse, values, make())
        return self.prepared.form

    def count(self, reason: str, happened: Bool[Tensor, ""]) -> None:
        """Adds 0 or 1 to a count, without a host sync."""
        before = self.counts.get(reason, torch.zeros((), dtype=torch.int64, device=happened.device))
        self.counts[reason] = before + happened

    def copy(self) -> "BlockMemory":
        """Returns a memory that holds the same tensors, and changes by itself."""
        return replace(self, kept=dict(self.kept), counts=dict(self.counts))

    def state_dict(self) -> dict[str, Any]:
        """Returns copies of all tensors; empty where nothing is kept."""
        state = {
            "kept": {name: tensor.clone() for name, tensor in self.kept.items()},
            "measured": None if self.measured is None else self.measured.clone(),
            "counts": {reason: tensor.clone() for reason, tensor in self.counts.items()},
            "first_use": None if self.first_use is None else self.first_use.clone(),
        }
        return state if any(value or isinstance(value, Tensor) for value in state.values()) else {}

    @classmethod
    def of_state(
        cls, state: Mapping[str, Any], device: torch.device, *, on_host: Collection[str] = ()
    ) -> "BlockMemory":
        """Goes on, on `device`, from what `state_dict` returned; what it keeps by the names `on_host` stays there."""
        measured, first_use = state["measured"], state["first_use"]
        kept = state["kept"].items()
        return cls(
            kept={name: tensor.to("cpu" if name in on_host else device, copy=True) for name, tensor in kept},
            measured=None if measured is None else measured.to(device, copy=True),
            counts={reason: tensor.to(device, copy=True) for reason, tensor in state["counts"].items()},
            first_use=None if first_use is None else first_use.to(device, copy=True),
        )

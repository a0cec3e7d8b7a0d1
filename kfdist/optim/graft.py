"""How parameters move: first-order updates, directions given the length of such an update, momentum and decay.

Lists run over the parameters of one group, alike in order. Everything is done by torch's foreach operations, on the
parameters' device, and nothing waits for it; a step's number is on the CPU, as in torch.optim.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from kfdist.errors import ConfigError
from kfdist.runtime.step_lengths import GraftLengths
from kfdist.torch_internals import (
    foreach_add_,
    foreach_addcmul_,
    foreach_div,
    foreach_div_,
    foreach_lerp_,
    foreach_mul,
    foreach_mul_,
    foreach_norm,
    foreach_sqrt,
)

Graft = Literal["adamw", "sgd"]
"""Whose length a direction is given."""

State = dict[str, Any]
"""What an optimizer keeps of one parameter, by name."""

_SMALL = 1e-12
"""Norms in float32 between this and its inverse can be trusted: entries whose squares are lost are ten million times
smaller."""


class Kept(NamedTuple):
    """How many tensors of a parameter's shape are kept of one with a block, and of one without."""

    of_blocks: int
    of_others: int


KEPT: Mapping[str, Kept] = {"adamw": Kept(2, 2), "sgd": Kept(1, 1), "none": Kept(1, 2)}
"""By graft."""


@dataclass(frozen=True, kw_only=True)
class Members:
    """Those parameters of a group that a step treats alike, with their gradients and states.

    Attributes:
        parameters: The parameters.
        gradients: Their gradients, dense.
        states: Their states.
        group: The group's settings: lr, betas, eps, weight_decay.
    """

    parameters: list[Tensor]
    gradients: list[Tensor]
    states: list[State]
    group: Mapping[str, Any]

    @property
    def rate(self) -> float:
        """The learning rate."""
        return rate_of(self.group)

    def kept(self, name: str) -> list[Tensor]:
        """Returns a tensor of each state, zeros where it is new."""
        for parameter, state in zip(self.parameters, self.states, strict=True):
            if name not in state:
                state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return [state[name] for state in self.states]

    def counts(self) -> list[Tensor]:
        """Returns the steps done of each, scalars on the CPU."""
        for state in self.states:
            if "step" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
        return [state["step"] for state in self.states]

    def count(self) -> list[float]:
        """Counts this step; returns each parameter's number of steps, from 1."""
        return [float(count.add_(1)) for count in self.counts()]


def rate_of(group: Mapping[str, Any]) -> Any:
    """Returns a group's learning rate as a number, also where it is a tensor, as torch's optimizers take it.

    Raises:
        ConfigError: The tensor isn't one number; or it is on a device, for which each step would have to wait.
    """
    lr = group["lr"]
    if not isinstance(lr, Tensor):
        return lr
    if lr.numel() != 1:
        raise ConfigError(f"is a tensor of shape {tuple(lr.shape)}; one number is needed", path="lr")
    if lr.device.type != "cpu":
        raise ConfigError(
            f"is a tensor on {lr.device}, for which each step would have to wait; keep it on the CPU, as lr.cpu(), "
            "wherever the model is: schedulers change it there",
            path="lr",
        )
    return lr.item()


def step_by_adamw(members: Members) -> None:
    """Makes AdamW's step, by torch's own function (Loshchilov and Hutter, arXiv 1711.05101)."""
    group = members.group
    beta1, beta2 = group["betas"]
    new = ["exp_avg" not in state and "step" in state for state in members.states]
    first, counts = members.kept("exp_avg"), members.counts()
    for place in (place for place, is_new in enumerate(new) if is_new):
        # A parameter that had a block before: as if it had always had this gradient.
        first[place].add_(members.gradients[place], alpha=1 - beta1 ** float(counts[place]))
    adamw(
        members.parameters,
        members.gradients,
        first,
        members.kept("exp_avg_sq"),
        [],
        counts,
        has_complex=any(map(torch.is_complex, members.parameters)),
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=members.rate,
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


def adamw_updates(members: Members) -> list[Tensor]:
    """Advances AdamW's second moment; returns V / (sqrt(v_hat) + eps), whose average is what AdamW steps along."""
    beta2, gradients, steps = members.group["betas"][1], members.gradients, members.count()
    second = members.kept("exp_avg_sq")
    foreach_mul_(second, beta2)
    foreach_addcmul_(second, gradients, gradients, 1 - beta2)
    root = foreach_sqrt(second)
    foreach_div_(root, [math.sqrt(1 - beta2**t) for t in steps])
    foreach_add_(root, members.group["eps"])
    return list(foreach_div(gradients, root))


def grafted(
    directions: list[Tensor], gradients: list[Tensor], updates: list[Tensor]
) -> tuple[list[Tensor], GraftLengths]:
    """Gives each direction the length of an update; one that is zero, not finite or uphill is replaced by the update.

    Args:
        directions: U, shaped like the parameters.
        gradients: V; a direction is uphill where <U, V> is not positive.
        updates: What the graft would step along.

    Returns:
        |update| U / |U|, or the update; and the lengths, on the device.
    """
    lengths, wanted = norms_of(directions), norms_of(updates)
    scales = (wanted / lengths).unbind()
    steps = [scale * U for scale, U in zip(scales, directions, strict=True)]
    # Of the scaled direction, which has an update's size: products of V and a far larger or smaller U leave the range.
    slopes = torch.stack([torch.sum(S * V) for S, V in zip(steps, gradients, strict=True)])
    usable = (slopes > 0) & slopes.isfinite()
    for place, (update, kept) in enumerate(zip(updates, usable.unbind(), strict=True)):  # one by one: each takes memory
        steps[place] = torch.where(kept, steps[place], update).to(update.dtype)
    return steps, GraftLengths(wanted, lengths, usable)


def norms_of(tensors: list[Tensor]) -> Tensor:
    """Returns the norms of real tensors, `[n]`, also where the squares of their entries leave their dtype's range.

    They are summed in float32 at least; on a GPU in float64, which takes no launch more and no time beside the reading.
    A CPU makes a copy for that, and does so for those alone whose norm in float32 can't be trusted.
    """
    kind = tensors[0].device.type
    dtype = reduce(torch.promote_types, (each.dtype for each in tensors), torch.float32)
    norms = list(foreach_norm(tensors, dtype=torch.float64 if kind == "cuda" else dtype))
    if kind == "cpu" and dtype == torch.float32:
        for place, norm in enumerate(torch.stack(norms).tolist()):
            if not _SMALL < norm < 1 / _SMALL:
                norms[place] = torch.linalg.vector_norm(tensors[place], dtype=torch.float64).to(dtype)
    return torch.stack(norms)


def move_by_average(members: Members, steps: list[Tensor]) -> None:
    """Moves parameters along the bias-corrected average of their steps over time, after the decay."""
    beta1, counts = members.group["betas"][0], [float(count) for count in members.counts()]
    fresh = ["momentum" not in state for state in members.states]
    average = members.kept("momentum")
    for place in (place for place, new in enumerate(fresh) if new and counts[place] > 1):
        # A parameter that had no block before: as if it had always been stepped like this.
        average[place].add_(steps[place], alpha=1 - beta1 ** (counts[place] - 1))
    foreach_lerp_(average, steps, 1 - beta1)
    _decay(members)
    lr = members.rate
    foreach_add_(members.parameters, foreach_mul(average, [-lr / (1 - beta1**t) for t in counts]))


def move_along(members: Members, steps: list[Tensor]) -> None:
    """Moves parameters along steps that have their momentum and size already, after the decay."""
    _decay(members)
    foreach_add_(members.parameters, steps, alpha=-members.rate)


def move_by_momentum(members: Members, steps: list[Tensor]) -> None:
    """Moves parameters along the sum of their steps, each of which fades by beta1 a step, after the decay."""
    momentum = members.kept("momentum")
    foreach_mul_(momentum, members.group["betas"][0])
    foreach_add_(momentum, steps)
    _decay(members)
    foreach_add_(members.parameters, momentum, alpha=-members.rate)


def _decay(members: Members) -> None:
    if members.group["weight_decay"]:
        foreach_mul_(members.parameters, 1 - members.rate * members.group["weight_decay"])

"""Applies adopted snapshots to the gradients in `.grad`, with the KL clip; no host sync."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kfdist.comm.communicator import Communicator
from kfdist.curvature.averages import BatchStatistics
from kfdist.curvature.blocks import Block
from kfdist.curvature.inverse import AbstractPreconditioner, BlockMemory


@dataclass(frozen=True, kw_only=True)
class Application:
    """How the gradients of a group's blocks are treated this step.

    Attributes:
        blocks: The blocks, of which at least one has a gradient.
        preconditioners: Their adopted preconditioners.
        memories: What each keeps from step to step.
        damping: lambda, already raised where the staleness policy says so.
        fallback: Use V / (lambda + tau) instead.
        solver: The rank that computes the direction where it is exchanged.
        rows: This step's batch of a single block whose inverse is multiplied onto its rows; None: onto the gradient.
    """

    blocks: Sequence[Block]
    preconditioners: Sequence[AbstractPreconditioner]
    memories: Sequence[BlockMemory]
    damping: float
    fallback: bool
    solver: int = 0
    rows: BatchStatistics | None = None

    @property
    def exchanged(self) -> bool:
        """Whether one rank computes the direction for all."""
        return not self.fallback and any(each.exchanged for each in self.preconditioners)

    def gradients(self) -> list[Tensor]:
        """Returns each block's V; zero where a coupled block took no part in the loss."""
        return [block.gradient() if _takes_part(block) else _no_gradient(block) for block in self.blocks]

    def directions(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Returns each block's U = (F + lambda I)^-1 V."""
        members = self.preconditioners
        if self.fallback:
            pairs = zip(members, gradients, strict=True)
            return [each.fallback(V, self.damping) for each, V in pairs]
        if self.rows is not None:
            rows, examples = self.rows.rows, self.rows.examples
            assert not isinstance(examples, Tensor), "experts have no such method"
            return [members[0].apply_to_rows(rows["A"], rows["G"], examples, self.damping).to(gradients[0].dtype)]
        return type(members[0]).apply_group(members, gradients, self.damping, self.memories)

    def measured(self) -> list[Tensor | None]:
        """Returns, of each block, which of its c matrices were ever measured, `[c, 1, 1]` or a scalar; None for all.

        Of those that weren't, as of an expert that no row has met yet, nothing is known, and they keep V.
        """
        return [
            (each.trace_A > 0).view(-1, 1, 1) if block.routed else memory.measured
            for block, each, memory in zip(self.blocks, self.preconditioners, self.memories, strict=True)
        ]


class Solved(NamedTuple):
    """A block's direction U beside its gradient V, what of it was measured (None: all), and the block's memory."""

    block: Block
    gradient: Tensor
    direction: Tensor
    measured: Tensor | None
    memory: BlockMemory

    def known(self, found: Tensor, otherwise: Tensor | float) -> Tensor:
        """Returns something else for what was never measured, without a host sync."""
        return found if self.measured is None else torch.where(self.measured, found, otherwise)


def solve(applications: Sequence[Application], communicator: Communicator) -> list[Solved]:
    """Returns the directions of all blocks that have a gradient; `.grad` stays as it is.

    Directions that are exchanged are computed by one rank each and broadcast.

    Args:
        applications: The groups that have a gradient and a snapshot, in the same order on all ranks.
        communicator: Carries the exchanged directions.
    """
    found: list[Solved] = []
    travelling: dict[int, list[Tensor]] = {}
    received: list[tuple[AbstractPreconditioner, Tensor, BlockMemory]] = []
    for each in applications:
        gradients = each.gradients()
        if not each.exchanged or each.solver == communicator.rank:
            directions = each.directions(gradients)
        else:
            directions = [torch.empty_like(V) for V in gradients]
        if each.exchanged:
            travelling.setdefault(each.solver, []).extend(directions)
            received += zip(each.preconditioners, directions, each.memories, strict=True)
        together = zip(each.blocks, gradients, directions, each.measured(), each.memories, strict=True)
        found += [Solved(*solved) for solved in together if _takes_part(solved[0])]
    for solver, directions in sorted(travelling.items()):
        _broadcast(directions, solver, communicator)
    for preconditioner, direction, memory in received:
        preconditioner.receive(direction, memory)
    return [each._replace(direction=each.known(each.direction, each.gradient)) for each in found]


def precondition_gradients(
    applications: Sequence[Application],
    *,
    kl_clip: float | None,
    learning_rate: Callable[[nn.Parameter], float],
    communicator: Communicator,
) -> Tensor | None:
    r"""Replaces each V_l in `.grad` by nu nu_l U_l with U_l = (F_l + lambda I)^-1 V_l.

    nu = min(1, sqrt(kappa / sum_l lr_l^2 nu_l^2 <U_l, V_l>)) bounds the step's predicted KL divergence by kappa
    (algorithms.md 1.4); where the sum is not positive nu is 1. A layer's learning rate is its weight's.

    nu_l = min(1, sqrt(max(1, r_l) / <U_l, V_l>)) bounds what a block adds to that sum by what it added, r_l, at the
    first step of the inverse in use, or by 1, which the exact empirical Fisher of the step itself never exceeds. An
    older inverse does: a gradient that has left the directions in which curvature was measured meets lambda alone, and
    the prediction no longer bounds anything (docs/decisions/0017).

    What was never measured (`Application.measured`) keeps V and isn't in the sum.

    Args:
        applications: The groups that have a gradient and a snapshot.
        kl_clip: kappa; None turns both clips off.
        learning_rate: The learning rate of a parameter; asked only with a `kl_clip`.
        communicator: Carries directions that one rank computes for all.

    Returns:
        nu, on the device; None where nothing was clipped.
    """
    if not applications:
        return None
    found = solve(applications, communicator)
    if kl_clip is None or not found:
        for each in found:
            each.block.write_gradient(each.direction)
        return None
    products = torch.stack([torch.sum(each.known(each.direction * each.gradient, 0.0)) for each in found])
    shares = _shares(products, [each.memory for each in found])
    rates = [learning_rate(each.block.parameters()[0]) for each in found]
    terms = [lr**2 * each for lr, each in zip(rates, (shares.square() * products).unbind(), strict=True)]
    total = sum(terms[1:], start=terms[0])
    factor = torch.sqrt(kl_clip / _positive(total)).clamp_max(1.0)
    for each, scale in zip(found, (shares * factor).unbind(), strict=True):
        U = each.direction
        each.block.write_gradient(each.known(U * scale.to(U.dtype), each.gradient))
    return factor


def _shares(products: Tensor, memories: Sequence[BlockMemory]) -> Tensor:
    """Returns nu_l of all blocks, and remembers r_l where this is the first gradient that the inverse in use meets.

    One that overflowed, whose step a GradScaler skips, is none.
    """
    together = zip(products.unbind(), memories, strict=True)
    first = torch.stack([product if memory.first_use is None else memory.first_use for product, memory in together])
    first = torch.where(first.isfinite(), first, products)
    for memory, each in zip(memories, first.unbind(), strict=True):
        memory.first_use = each
    return torch.sqrt(first.clamp_min(1.0) / _positive(products)).clamp_max(1.0)


def _positive(number: Tensor) -> Tensor:
    """Keeps roots and quotients defined where a number is not positive; there the minimum picks 1."""
    return number.clamp_min(torch.finfo(number.dtype).tiny)


def _takes_part(block: Block) -> bool:
    return all(parameter.grad is not None for parameter in block.parameters())


def _no_gradient(block: Block) -> Tensor:
    weight, shape = block.parameters()[0], block.shape
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return torch.zeros(shape.groups, shape.d_out, shape.d_in, dtype=dtype, device=weight.device)


def _broadcast(directions: Sequence[Tensor], solver: int, communicator: Communicator) -> None:
    """Overwrites the directions by those of one rank, in one flat buffer."""
    if communicator.process_group is None:
        return
    flat = torch.cat([direction.reshape(-1) for direction in directions])
    travelling = communicator.to_travel(flat)
    communicator.broadcast(travelling, solver).wait()
    pieces = travelling.to(flat.device).split([direction.numel() for direction in directions])
    for direction, piece in zip(directions, pieces, strict=True):
        direction.copy_(piece.view(direction.shape))

"""Applies adopted snapshots to gradients, with the KL clip; no host sync."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kfdist.comm.communicator import Communicator
from kfdist.curvature.averages import BatchStatistics
from kfdist.curvature.block_memory import BlockMemory
from kfdist.curvature.blocks import Block
from kfdist.curvature.inverse import AbstractPreconditioner, Direction
from kfdist.curvature.inverters.unit_wise import UnitWiseInverse
from kfdist.linalg.sparse_rows import dense_of
from kfdist.runtime.apply.in_place import InPlace, in_place
from kfdist.runtime.apply.units_together import UnitsInUse, UnitsSolved, UnitsTogether, fit


@dataclass(frozen=True, kw_only=True, eq=False)  # those of a step are compared by identity
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

    @cached_property
    def exchanged(self) -> bool:
        """Whether one rank computes the direction for all."""
        return not self.fallback and any(each.exchanged for each in self.preconditioners)

    @cached_property
    def alone(self) -> bool:
        """Whether it is a single block on the host, of which the inverse's `_solve` is all there is to do.

        On the host memory is what counts: a pass over it that joins the gradients of weight and bias, or that makes a
        direction beside its gradient. On a GPU it is launches, of which both save some. A block that shares numbers of
        a parameter isn't: what is written over its gradient would be in the midst of the other's.
        """
        block = self.blocks[0]
        return (
            len(self.blocks) == 1
            and not (block.routed or block.shares or self.fallback or self.exchanged)
            and self.rows is None
            and self.memories[0].measured is None
            and not joined_on(block.weight.device)
        )

    @property
    def units(self) -> UnitsInUse | None:
        """What it is for `UnitsTogether`; None where it isn't for that."""
        block, inverse = self.blocks[0], self.preconditioners[0]
        if len(self.blocks) > 1 or self.fallback or not isinstance(inverse, UnitWiseInverse) or not fit(block, inverse):
            return None
        return UnitsInUse(block, inverse, self.memories[0], self.damping)

    @property
    def apart(self) -> bool:
        """Whether the gradients of weight and bias go their ways apart, of one that is `alone`."""
        return self.preconditioners[0].takes_apart and self.blocks[0].has_bias

    def gradients(self) -> list[Tensor]:
        """Returns each block's V; zero where a coupled block took no part in the loss."""
        return [block.gradient(copied=False) if block.takes_part else _no_gradient(block) for block in self.blocks]

    def directions(self, gradients: Sequence[Tensor]) -> list[Direction]:
        """Returns each block's U = (F + lambda I)^-1 V; the gradients stay."""
        members = self.preconditioners
        if self.fallback:
            pairs = zip(members, gradients, strict=True)
            return [Direction(each.fallback(V, self.damping)) for each, V in pairs]
        if self.rows is not None:
            rows, examples = self.rows.rows, self.rows.examples
            assert not isinstance(examples, Tensor), "experts have no such method"
            found = members[0].apply_to_rows(rows["A"], rows["G"], examples, self.damping)
            return [Direction(found.to(gradients[0].dtype))]
        return type(members[0]).directions(members, gradients, self.damping, self.memories)

    def measured(self) -> list[Tensor | None]:
        """Returns, of each block, which of its c matrices were ever measured, `[c]` or `[1]`; None for all.

        Of those that weren't, as of an expert that no row has met yet, nothing is known, and they keep V. Not so under
        a normalised method: zero factors have the axes for a basis, in which its direction is plain Adam's, and V would
        be a step of quite another size.
        """
        together = zip(self.blocks, self.preconditioners, self.memories, strict=True)
        return [_measured(*each) for each in together]


def _measured(block: Block, inverse: AbstractPreconditioner, memory: BlockMemory) -> Tensor | None:
    if inverse.normalised:
        return None
    if block.routed:
        return inverse.trace_A > 0
    return None if memory.measured is None else memory.measured.view(1)


class Solved(NamedTuple):
    """A block's direction U = scale X. Its gradient V is gone: where it was copied, it would double the memory taken.

    Attributes:
        block: The block.
        X: `[c, p, q]`, or apart `[c, p, q-1]` and `[c, p, 1]`; V where nothing was measured.
        scale: `[c]` or `[1]`; None for 1.
        measured: Which of the c matrices were ever measured, `[c]` or `[1]`; None for all.
        memory: The block's.
        product: <X, V> where `uniform`, else <U, V> of what was measured; `[1]`. None where nobody asked.
        clipped: Whether the KL clip is for it.
        own: Views of `.grad` in the shape of X, where V is nothing else.
    """

    block: Block
    X: tuple[Tensor, ...]
    scale: Tensor | None
    measured: Tensor | None
    memory: BlockMemory
    product: Tensor | None
    clipped: bool
    own: tuple[Tensor, ...] = ()

    @property
    def blocks(self) -> Sequence[Block]:
        """The block alone."""
        return (self.block,)

    @property
    def memories(self) -> Sequence[BlockMemory]:
        """Its alone."""
        return (self.memory,)

    @property
    def uniform(self) -> bool:
        """Whether one number scales all of its matrices, and all or none were measured."""
        return all(each is None or len(each) == 1 for each in (self.scale, self.measured))

    def multiplied(self, V: Sequence[Tensor]) -> "Solved":
        """Returns it with its `product`; V is in as many parts as X."""
        pairs = list(zip(self.X, V, strict=True))
        if self.uniform:
            return self._replace(product=_total([_dot(x, v) for x, v in pairs]).view(1))
        found = _total([torch.sum(x * v, (1, 2)) for x, v in pairs])
        found = found if self.scale is None else found * self.scale
        found = found if self.measured is None else torch.where(self.measured, found, 0.0)
        return self._replace(product=found.sum(0, keepdim=True))

    def write(self, factor: Tensor | None, into: dict[nn.Parameter, Tensor] | None) -> None:
        """Puts factor U into `.grad` or, given one, a table of directions; what was never measured keeps V.

        Args:
            factor: A scalar, `[1]`; None for 1.
            into: By parameter, of the direction's dtype. Rows of a parameter that no block has keep their gradients.
        """
        if self.measured is not None and factor is not None:
            factor = torch.where(self.measured, factor, 1.0)
        scale = self.scale if factor is None else factor if self.scale is None else factor * self.scale
        self.write_scaled(scale, into)

    def write_scaled(self, scale: Tensor | None, into: dict[nn.Parameter, Tensor] | None) -> None:
        """Puts scale X into `.grad` or, given one, a table of directions."""
        block, apart = self.block, len(self.X) > 1
        scale = None if scale is None else scale.to(self.X[0].dtype)
        if into is None and self.own and scale is not None and len(scale) == 1:
            for x, gradient in zip(self.X, self.own, strict=True):
                torch.mul(x, scale, out=gradient)
        elif into is None and apart:
            block.write_apart(self.X[0], self.X[1], scale)
        elif into is None:
            block.write_gradient(self.X[0], scale)
        if into is None:
            return
        U = [each if scale is None else each * scale.view(-1, 1, 1) for each in self.X]
        for part, direction in zip(block.parts, (block.from_apart if apart else block.from_matrix)(*U), strict=True):
            gradient = part.parameter.grad
            if gradient is None:  # frozen
                continue
            if part.whole:
                into[part.parameter] = direction
                continue
            if part.parameter not in into:
                into[part.parameter] = dense_of(gradient).to(direction.dtype, copy=True)
            part.write(into[part.parameter], direction)


def solve(
    applications: Sequence[Application], communicator: Communicator, *, multiplied: bool, overwrites: bool = False
) -> list[Solved | InPlace]:
    """Returns the directions of all blocks that have a gradient; `.grad` stays as it is.

    Directions that are exchanged are computed by one rank each and broadcast.

    Args:
        applications: The groups that have a gradient and a snapshot, in the same order on all ranks.
        communicator: Carries the exchanged directions.
        multiplied: Whether their products with the gradients are wanted.
        overwrites: Whether they will be written into `.grad`, so that it may be in the midst of making them.
    """
    found: list[Sequence[Solved | InPlace]] = []
    travelling: dict[int, list[Tensor]] = {}
    received: list[tuple[int, Sequence[Tensor], Sequence[Tensor]]] = []
    for place, each in enumerate(applications):
        if each.alone:
            block, inverse, memory = each.blocks[0], each.preconditioners[0], each.memories[0]
            one = in_place(block, inverse, each.damping, memory, multiplied=multiplied) if overwrites else None
            if one is None and each.apart:
                one = _solved_apart(each, multiplied=multiplied)
            if one is not None:
                found.append([one])
                continue
        gradients = each.gradients()
        if not each.exchanged:
            found.append(_solved(each, gradients, each.directions(gradients), multiplied=multiplied))
            continue
        found.append([])
        if each.solver == communicator.rank:
            finished = [direction.finished() for direction in each.directions(gradients)]
        else:
            finished = [torch.empty_like(V) for V in gradients]
        travelling.setdefault(each.solver, []).extend(finished)
        received.append((place, gradients, finished))
    for solver, travelled in sorted(travelling.items()):
        _broadcast(travelled, solver, communicator)
    for place, gradients, finished in received:
        each = applications[place]
        for preconditioner, direction, memory in zip(each.preconditioners, finished, each.memories, strict=True):
            preconditioner.receive(direction, memory)
        found[place] = _solved(each, gradients, [Direction(X) for X in finished], multiplied=multiplied)
    return [one for of_group in found for one in of_group]


def _solved(
    application: Application, gradients: Sequence[Tensor], directions: Sequence[Direction], *, multiplied: bool
) -> list[Solved]:
    """Joins what belongs to each block that has a gradient; V, without a host sync, where nothing was measured."""
    blocks, memories = application.blocks, application.memories
    solves = [inverse.solves for inverse in application.preconditioners]
    found: list[Solved] = []
    for block, V, (X, scale), measured, memory, clipped in zip(
        blocks, gradients, directions, application.measured(), memories, solves, strict=True
    ):
        if not block.takes_part:
            continue
        if measured is not None:
            X = torch.where(measured.view(-1, 1, 1), X, V)
            scale = None if scale is None else torch.where(measured, scale, 1.0)
        one = Solved(block, (X,), scale, measured, memory, None, clipped)
        found.append(one.multiplied([V]) if multiplied and clipped else one)
    return found


def _solved_apart(application: Application, *, multiplied: bool) -> Solved:
    """Does what `_solved` does of the single block of a group that is `apart`."""
    block, inverse, memory = application.blocks[0], application.preconditioners[0], application.memories[0]
    V = block.gradient_apart()
    (X, scale), last = inverse.direction_apart(*V, application.damping, memory)
    one = Solved(block, (X, last), scale, None, memory, None, inverse.solves, V if block.has_gradient_in(V) else ())
    return one.multiplied(V) if multiplied and inverse.solves else one


def joined_on(device: torch.device) -> bool:
    """Says whether a block's gradients of weight and bias are joined to one matrix where launches count."""
    return device.type != "cpu"


def _total(terms: Sequence[Tensor]) -> Tensor:
    """Returns the sum of one or two."""
    return terms[0] if len(terms) == 1 else terms[0] + terms[1]


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """Returns <x, y>, a scalar."""
    contiguous = x.is_contiguous() and y.is_contiguous()
    return torch.dot(x.view(-1), y.view(-1)) if contiguous else torch.sum(x * y)


def precondition_gradients(
    applications: Sequence[Application],
    *,
    kl_clip: float | None,
    learning_rate: Callable[[nn.Parameter], float],
    communicator: Communicator,
    into: dict[nn.Parameter, Tensor] | None = None,
    together: UnitsTogether | None = None,
) -> Tensor | None:
    r"""Replaces each V_l in `.grad` by nu nu_l U_l with U_l = (F_l + lambda I)^-1 V_l; or puts that elsewhere.

    nu = min(1, sqrt(kappa / sum_l lr_l^2 nu_l^2 <U_l, V_l>)) bounds the step's predicted KL divergence by kappa
    (algorithms.md 1.4); where the sum is not positive nu is 1. A layer's learning rate is its weight's.

    nu_l = min(1, sqrt(max(1, r_l) / <U_l, V_l>)) bounds what a block adds to that sum by what it added, r_l, at the
    first step of the inverse in use, or by 1, which the exact empirical Fisher of the step itself never exceeds. An
    older inverse does: a gradient that has left the directions in which curvature was measured meets lambda alone, and
    the prediction no longer bounds anything (docs/decisions/0017).

    What was never measured (`Application.measured`) keeps V and isn't in the sum; directions that don't solve for a
    Fisher matrix aren't either, and keep their size.

    Args:
        applications: The groups that have a gradient and a snapshot.
        kl_clip: kappa; None turns both clips off.
        learning_rate: The learning rate of a parameter; asked only with a `kl_clip`.
        communicator: Carries directions that one rank computes for all.
        into: Where the result goes, by parameter, in the place of `.grad`.
        together: Solves blocks of units together; None: each by itself.

    Returns:
        nu, on the device; None where nothing was clipped.
    """
    if not applications:
        return None
    multiplied = kl_clip is not None
    found: list[Solved | InPlace | UnitsSolved] = []
    if together is not None:
        found, applications = _of_units(applications, together, multiplied)
    found += solve(applications, communicator, multiplied=multiplied, overwrites=into is None)
    clipped = [each for each in found if kl_clip is not None and each.clipped]
    for each in found:
        if kl_clip is None or not each.clipped:
            each.write(None, into)
    if kl_clip is None or not clipped:
        return None
    # What there is one number a block of is computed for all of them together: on a GPU each operation is a launch.
    scales, measured = _uniform_scales(clipped), _uniformly_measured(clipped)
    products = torch.cat([each.product for each in clipped if each.product is not None])  # they all have one
    products = products if scales is None else products * scales
    products = products if measured is None else torch.where(measured, products, 0.0)
    shares = _shares(products, [memory for each in clipped for memory in each.memories])
    rates = [learning_rate(block.parameters()[0]) for each in clipped for block in each.blocks]
    total = _weighted_sum(rates, shares.square() * products)
    factor = torch.sqrt(kl_clip / _positive(total)).clamp_max(1.0)
    factors = shares * factor
    factors = factors if scales is None else factors * scales
    factors = factors if measured is None else torch.where(measured, factors, 1.0)
    counts = [len(each.blocks) for each in clipped]
    for each, scale in zip(clipped, factors.split(counts), strict=True):
        if each.uniform:
            each.write_scaled(scale, into)
        else:
            each.write(scale, into)
    return factor


def _of_units(
    applications: Sequence[Application], together: UnitsTogether, multiplied: bool
) -> tuple[list[Solved | InPlace | UnitsSolved], Sequence[Application]]:
    """Solves the blocks of units; returns them, and the other groups."""
    units = [each.units for each in applications]
    found = together.solve([each for each in units if each is not None], multiplied=multiplied)
    return [*found], [each for each, of_units in zip(applications, units, strict=True) if of_units is None]


def _uniform_scales(found: Sequence[Solved | InPlace | UnitsSolved]) -> Tensor | None:
    """Returns the scale of each block that is `uniform`, 1 for the others, `[blocks]`; None where all are 1."""
    if all(each.scale is None or not each.uniform for each in found):
        return None
    products = [each.product for each in found if each.product is not None]
    one = products[0].new_ones(1)
    scales = [each.scale if each.uniform else None for each in found]
    pairs = zip(found, scales, strict=True)
    return torch.cat([one.expand(len(each.blocks)) if scale is None else scale for each, scale in pairs])


def _uniformly_measured(found: Sequence[Solved | InPlace | UnitsSolved]) -> Tensor | None:
    """Returns whether each block that is `uniform` was measured, true for the others, `[blocks]`; None for all."""
    if all(each.measured is None or not each.uniform for each in found):
        return None
    true = torch.ones(1, dtype=torch.bool, device=found[0].blocks[0].weight.device)
    measured = [each.measured if each.uniform else None for each in found]
    pairs = zip(found, measured, strict=True)
    return torch.cat([true.expand(len(each.blocks)) if known is None else known for each, known in pairs])


def _weighted_sum(rates: Sequence[float | Tensor], terms: Tensor) -> Tensor:
    """Returns sum_l lr_l^2 terms_l; those of one rate are added up first, as most are of one."""
    alike: dict[object, list[int]] = {}
    for place, rate in enumerate(rates):
        alike.setdefault(id(rate) if isinstance(rate, Tensor) else rate, []).append(place)
    if len(alike) == 1:
        return terms.sum() * rates[0] ** 2
    each = terms.unbind()
    sums = [torch.stack([each[place] for place in places]).sum() * rates[places[0]] ** 2 for places in alike.values()]
    return torch.stack(sums).sum()


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

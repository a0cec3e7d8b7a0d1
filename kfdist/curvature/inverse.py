"""What every inverted block is: a frozen dataclass of tensors with a fast `apply`."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from kfdist.curvature.block_memory import BlockMemory
from kfdist.curvature.statistics import Samples
from kfdist.linalg.brand import solve_rows
from kfdist.linalg.kronecker import (
    DampingRule,
    FactoredInverse,
    FactorInverse,
    JointInverse,
    Spectrum,
    split_by_largest,
    split_by_trace,
)
from kfdist.wire.records import move, symmetric_field

_CHEAP_DIMENSION = 256
"""Of factors whose eigenvalues `spectra` computes: milliseconds each on one CPU."""

_LARGE = 1 << 17
"""Numbers in a gradient from which on a pass over it costs more than a few operations more."""


class Direction(NamedTuple):
    """U = scale X, of which the product is left to whoever multiplies X with other numbers anyway.

    Attributes:
        X: `[c, p, q]`, overwritten by whoever is given it.
        scale: `[c]`; None for 1.
    """

    X: Tensor
    scale: Tensor | None = None

    def finished(self) -> Float[Tensor, "c p q"]:
        """Returns U; `X` may be overwritten."""
        return self.X if self.scale is None else self.X.mul_(self.scale.view(-1, 1, 1))


@dataclass(frozen=True, kw_only=True)
class AbstractPreconditioner(ABC):
    """The damped inverse of one block, ready to be multiplied onto gradients.

    Attributes:
        trace_A: Trace of the undamped factor A, `[c]`.
        trace_G: Trace of the undamped factor G, `[c]`.
        damping_at_apply: Whether `apply` obeys its `damping`; otherwise damping was fixed at the inversion.
        calibrated: Whether the ranks measure part of it themselves while it is in use (see `calibration_sums`).
        keeps_memory: Whether what a block's memory keeps outlives the snapshot; otherwise a newer one starts afresh.
        normalised: Whether directions have the size of Adam's, about 1 for each entry in some basis, momentum included:
            nothing clips them, grafts onto them or averages them again, and a learning rate is AdamW's.
        solves: Whether directions are (F + lambda I)^-1 V for a Fisher matrix F, so that <U, V> is a divergence, which
            the KL clip bounds, and a quadratic model holds. Not so of what is normalised, or a root of a matrix.
        on_host: Names of single numbers that a block's memory keeps on the host, so that no device works them out.

    The traces give `fallback` its scale. A method that knows only the trace of the whole block puts that into `trace_A`
    and 1 into `trace_G`.
    """

    damping_at_apply: ClassVar[bool]
    calibrated: ClassVar[bool] = False
    keeps_memory: ClassVar[bool] = False
    normalised: ClassVar[bool] = False
    solves: ClassVar[bool] = True
    on_host: ClassVar[frozenset[str]] = frozenset()

    trace_A: Tensor
    trace_G: Tensor

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """Shape (c, p, q) of the gradients it takes."""

    def serves(self, damping: float) -> bool:
        """Says whether directions at this damping are as near to the exact ones as was asked for."""
        del damping
        return True

    @property
    def exchanged(self) -> bool:
        """Whether one rank computes the direction and sends it to the others, because solving is the costly part."""
        return False

    def spectra(self, memory: BlockMemory) -> dict[str, tuple[Tensor, int]]:
        """Returns the eigenvalues of each factor that are held or cheap, by the factor's name, and its dimension.

        For records of a run, not for the training path: it may wait for the device.

        Args:
            memory: What the block keeps beside the inverse.

        Raises:
            RuntimeError: They can't be computed, as of an inverse that isn't finite.
        """
        del memory
        return {}

    @abstractmethod
    def _solve(self, gradient: Tensor, damping: float, memory: BlockMemory) -> Tensor | Direction:
        """Applies the inverse to a gradient of the right shape and dtype, which stays; may change `memory`.

        Returns:
            A tensor of its own, or one that lacks a factor.
        """

    def take_over(self, before: "AbstractPreconditioner", memory: BlockMemory) -> None:
        """Makes what the memory keeps fit this inverse, which comes into use after `before`; where `keeps_memory`."""
        del before, memory

    def receive(self, direction: Float[Tensor, "c p q"], memory: BlockMemory) -> None:
        """Keeps of an exchanged direction what must be equal on all ranks; called on each, the solver included.

        Args:
            direction: As all ranks have it now; overwritten later.
            memory: What the block keeps from step to step.
        """
        del direction, memory

    def apply(
        self, gradient: Float[Tensor, "c p q"], damping: float, memory: BlockMemory | None = None
    ) -> Float[Tensor, "c p q"]:
        """Multiplies the damped inverse of the block onto a gradient, without a host sync.

        Computes in the dtype of the preconditioner's tensors, also under autocast.

        Args:
            gradient: V, on the same device.
            damping: lambda of F + lambda I; without effect where `damping_at_apply` is False.
            memory: What the block keeps from step to step; None for nothing.

        Returns:
            The direction, in the gradient's dtype.

        Raises:
            ValueError: The gradient has another shape.
        """
        with torch.autocast(gradient.device.type, enabled=False):
            return self.direction(gradient, damping, BlockMemory() if memory is None else memory).finished()

    def direction(self, gradient: Float[Tensor, "c p q"], damping: float, memory: BlockMemory) -> Direction:
        """Applies the inverse as `apply` does, but for a factor that the direction may lack; not under autocast."""
        if tuple(gradient.shape) != self.shape:
            raise ValueError(f"the gradient has shape {tuple(gradient.shape)}, the preconditioner is for {self.shape}")
        solved = self._solve(gradient.to(self.trace_A.dtype), damping, memory)
        X, scale = (solved, None) if isinstance(solved, Tensor) else solved
        if X.dtype == gradient.dtype:
            return Direction(X, scale)
        return Direction(Direction(X, scale).finished().to(gradient.dtype))

    @property
    def takes_apart(self) -> bool:
        """Whether there is a `direction_apart`."""
        return False

    def direction_apart(
        self, weight: Float[Tensor, "c p w"], bias: Float[Tensor, "c p 1"], damping: float, memory: BlockMemory
    ) -> tuple[Direction, Float[Tensor, "c p 1"]]:
        """Applies the inverse as `direction` does to a gradient whose last column, the bias's, lies elsewhere.

        Joined, the weight's would be copied, into rows that begin anywhere, which products read more slowly.

        Returns:
            The weight's direction, and the bias's, which lacks the same factor.

        Raises:
            ValueError: The gradients have other shapes.
        """
        c, p, q = self.shape
        if tuple(weight.shape) != (c, p, q - 1) or tuple(bias.shape) != (c, p, 1):
            raise ValueError(
                f"the gradients have shapes {tuple(weight.shape)} and {tuple(bias.shape)}, the preconditioner is for "
                f"{(c, p, q - 1)} and {(c, p, 1)}"
            )
        dtype, own = weight.dtype, self.trace_A.dtype
        (X, scale), last = self._solve_apart(weight.to(own), bias.to(own), damping, memory)
        if dtype == own:
            return Direction(X, scale), last
        return Direction(Direction(X, scale).finished().to(dtype)), Direction(last, scale).finished().to(dtype)

    def _solve_apart(
        self, weight: Tensor, bias: Tensor, damping: float, memory: BlockMemory
    ) -> tuple[Direction, Tensor]:
        """Does what `_solve` does, as `direction_apart` says; only where `takes_apart`."""
        raise NotImplementedError(f"{type(self).__name__} takes gradients whole")

    def in_place_form(self, damping: float, memory: BlockMemory) -> FactoredInverse | None:
        """Returns the form, with a scale, that a `ProjectedGradient` can be made with; it looks at no gradient.

        None where an inverse has no such form, or it isn't worth it.

        Args:
            damping: lambda of F + lambda I.
            memory: What the block keeps from step to step.
        """
        del damping, memory
        return None

    @classmethod
    def directions(
        cls,
        members: Sequence[Self],
        gradients: Sequence[Float[Tensor, "_ _ _"]],
        damping: float,
        memories: Sequence[BlockMemory],
    ) -> list[Direction]:
        """Applies the inverses of a group of blocks, not under autocast; methods that couple blocks override it.

        Args:
            members: One per block, in the group's order.
            gradients: One per block; they stay.
            damping: lambda of F + lambda I; without effect where `damping_at_apply` is False.
            memories: One per block.

        Returns:
            One direction per block, in its gradient's dtype.
        """
        each = zip(members, gradients, memories, strict=True)
        return [member.direction(gradient, damping, memory) for member, gradient, memory in each]

    @classmethod
    def apply_group(
        cls,
        members: Sequence[Self],
        gradients: Sequence[Float[Tensor, "_ _ _"]],
        damping: float,
        memories: Sequence[BlockMemory],
    ) -> list[Float[Tensor, "_ _ _"]]:
        """Returns `directions`, finished; also under autocast."""
        with torch.autocast(gradients[0].device.type if gradients else "cpu", enabled=False):
            return [found.finished() for found in cls.directions(members, gradients, damping, memories)]

    def apply_to_rows(
        self, a: Float[Tensor, "c n q"], g: Float[Tensor, "c n p"], examples: float, damping: float
    ) -> Float[Tensor, "c p q"]:
        """Multiplies the damped inverse onto the gradient V = g^T a/N without V; only where its rows are the smaller.

        Args:
            a: Layer inputs, homogeneous coordinate last.
            g: Output gradients of the per-example loss; n counts positions where there are several.
            examples: N.
            damping: lambda of F + lambda I.

        Returns:
            The direction, in the dtype of `g`.
        """
        raise NotImplementedError(f"{type(self).__name__} can't be multiplied onto rows; apply it to gradients")

    def calibration_sums(self, samples: Samples) -> dict[str, Tensor]:
        """Sums over this rank's examples what the block's memory is to hold; only where `calibrated`.

        The sums are added up over the ranks and folded into the memory like statistics: M <- rho M + (1 - rho) sum,
        starting afresh where a snapshot comes into use.
        """
        raise NotImplementedError(f"{type(self).__name__} is not calibrated by the ranks; `samples` has no use here")

    def fallback(self, gradient: Float[Tensor, "c p q"], damping: float) -> Float[Tensor, "c p q"]:
        """Scales a gradient as if every eigenvalue of the block were the mean one: V/(lambda + tau).

        tau = tr(A) tr(G)/(p q) per group: the step keeps the size it has under `apply`; the bare gradient would be up
        to 1/lambda times off.
        """
        scale = self.mean_damped(damping).view(-1, 1, 1)
        return (gradient.to(scale.dtype) / scale).to(gradient.dtype)

    def mean_damped(self, damping: float) -> Float[Tensor, " c"]:
        """Returns lambda + tau of `fallback`."""
        _, p, q = self.shape
        return self.joint_damping(damping) + (self.trace_A / q) * (self.trace_G / p)

    def joint_damping(self, damping: float) -> Float[Tensor, " c"]:
        """Returns the lambda on the product of the factors: what `damping` amounts to, or was at the inversion."""
        return torch.full_like(self.trace_A, damping)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Self:
        """Returns it with all tensors on `device` and, if given, as `dtype`; itself if nothing changes."""
        return move(self, device, dtype)


@dataclass(frozen=True, kw_only=True)
class InvertedFactors(AbstractPreconditioner):
    """Inverses of both factors, each damped when it was made.

    Attributes:
        A_inverse: (A + lambda_A I)^{-1}, in whatever form, q last.
        G_inverse: (G + lambda_G I)^{-1}, `[c, p, p]`.
        damping_A: lambda_A, `[c]`.
        damping_G: lambda_G, `[c]`.
    """

    damping_at_apply: ClassVar[bool] = False

    A_inverse: Tensor
    G_inverse: Tensor = symmetric_field()
    damping_A: Tensor
    damping_G: Tensor

    @property
    @override
    def shape(self) -> tuple[int, int, int]:
        return self.G_inverse.shape[0], self.G_inverse.shape[-1], self.A_inverse.shape[-1]

    @override
    def joint_damping(self, damping: float) -> Float[Tensor, " c"]:
        del damping
        return self.damping_A * self.damping_G


@dataclass(frozen=True, kw_only=True)
class KroneckerInverse(InvertedFactors):
    """Two dense inverses: G_inv V A_inv, with A_inv `[c, q, q]`."""

    A_inverse: Tensor = symmetric_field()

    @override
    def spectra(self, memory: BlockMemory) -> dict[str, tuple[Tensor, int]]:
        del memory
        c, p, q = self.shape
        factors = {"A": (self.A_inverse, self.damping_A, c * q), "G": (self.G_inverse, self.damping_G, c * p)}
        return {
            # On the CPU: a training's device may have little memory left, or no float64.
            factor: (1.0 / torch.linalg.eigvalsh(inverse.cpu().double()) - damping[:, None].cpu().double(), size)
            for factor, (inverse, damping, size) in factors.items()
            if inverse.shape[-1] <= _CHEAP_DIMENSION
        }

    @override
    def _solve(self, gradient: Tensor, damping: float, memory: BlockMemory) -> Tensor:
        del damping, memory
        return self.G_inverse @ gradient @ self.A_inverse


@dataclass(frozen=True, kw_only=True)
class KroneckerSpectrum(AbstractPreconditioner):
    """Eigenpairs of both factors, all or the leading ones; damped at apply.

    Attributes:
        U_A: Eigenvectors of A in columns, `[c, q, r_A]`.
        w_A: Eigenvalues of A, descending, `[c, r_A]`.
        tail_A: Eigenvalue of A orthogonal to U_A, `[c]`; 0 without spectrum continuation.
        U_G: Eigenvectors of G in columns, `[c, p, r_G]`.
        w_G: Eigenvalues of G, descending, `[c, r_G]`.
        tail_G: Eigenvalue of G orthogonal to U_G, `[c]`.
        damping_rule: How lambda acts: "common" on products of eigenvalues, "pi" and "relative" on each factor.
        least_damping: Smallest lambda for which there are eigenpairs enough (`kept_pairs`); 0 for any.
    """

    damping_at_apply: ClassVar[bool] = True

    U_A: Tensor
    w_A: Tensor
    tail_A: Tensor
    U_G: Tensor
    w_G: Tensor
    tail_G: Tensor
    damping_rule: DampingRule
    least_damping: float = 0.0

    @property
    @override
    def shape(self) -> tuple[int, int, int]:
        return self.U_G.shape[0], self.U_G.shape[-2], self.U_A.shape[-2]

    @classmethod
    def of(
        cls,
        A: Spectrum,
        G: Spectrum,
        *,
        trace_A: Float[Tensor, " c"],
        trace_G: Float[Tensor, " c"],
        damping_rule: DampingRule,
        least_damping: float = 0.0,
    ) -> Self:
        """Makes it from the spectra of both factors."""
        spectra = {"U_A": A.vectors, "w_A": A.values, "tail_A": A.tail, "U_G": G.vectors, "w_G": G.values}
        said: dict[str, Any] = {"damping_rule": damping_rule, "least_damping": least_damping}
        return cls(trace_A=trace_A, trace_G=trace_G, **spectra, tail_G=G.tail, **said)

    @override
    def serves(self, damping: float) -> bool:
        return damping >= self.least_damping

    @override
    def spectra(self, memory: BlockMemory) -> dict[str, tuple[Tensor, int]]:
        del memory
        c, p, q = self.shape
        return {"A": (self.w_A, c * q), "G": (self.w_G, c * p)}

    @property
    def A(self) -> Spectrum:
        """The factor of the inputs."""
        return Spectrum(self.U_A, self.w_A, self.tail_A)

    @property
    def G(self) -> Spectrum:
        """The factor of the output gradients."""
        return Spectrum(self.U_G, self.w_G, self.tail_G)

    def factor_damping(self, damping: float) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"]]:
        """Returns lambda_A and lambda_G of the rules that damp each factor.

        Args:
            damping: lambda; for "relative" it is phi, the fraction of the largest eigenvalue.
        """
        if self.damping_rule == "relative":
            return split_by_largest(self.w_A[:, 0], self.w_G[:, 0], damping=damping)
        _, p, q = self.shape
        return split_by_trace(self.trace_A, self.trace_G, d_in=q, d_out=p, damping=damping)

    @override
    def joint_damping(self, damping: float) -> Float[Tensor, " c"]:
        if self.damping_rule != "relative":
            return super().joint_damping(damping)
        damping_A, damping_G = self.factor_damping(damping)
        return damping_A * damping_G

    @override
    def apply_to_rows(
        self, a: Float[Tensor, "c n q"], g: Float[Tensor, "c n p"], examples: float, damping: float
    ) -> Float[Tensor, "c p q"]:
        """Multiplies the damped inverse onto the gradient V = g^T a/N without V, without a host sync.

        Linear in p + q but for the one product of size p q that forming V takes too (algorithms.md 4.3). It equals
        `apply(V)` only where the gradient is nothing but that sum: one process, one micro-batch per step, the rows of
        the training loss's own backward pass, all of them (no positions sub-sampled, no label sampled), mean reduction,
        every use of the weight seen by the block, and V not yet clipped, unscaled, decayed or mixed with momentum. Over
        ranks or micro-batches `apply` on the averaged V is the one to call. It pays where the n rows are fewer than
        about twice r_A + r_G.

        Raises:
            ValueError: The damping rule is "common", or the rows have another shape.
        """
        c, p, q = self.shape
        n = a.shape[-2]
        if self.damping_rule == "common":
            raise ValueError(f"damping_rule {self.damping_rule!r} doesn't split into factors; call `apply`")
        if tuple(a.shape) != (c, n, q) or tuple(g.shape) != (c, n, p):
            raise ValueError(
                f"the rows have shapes {tuple(a.shape)} and {tuple(g.shape)}, must be {(c, n, q)} and {(c, n, p)}"
            )
        with torch.autocast(g.device.type, enabled=False):
            rows = a.to(self.U_A.dtype), g.to(self.U_G.dtype)
            return solve_rows(self.A, self.G, self.factor_damping(damping), rows, examples).to(g.dtype)

    @override
    def _solve(self, gradient: Tensor, damping: float, memory: BlockMemory) -> Direction:
        return Direction(*self._form(damping, memory).solve(gradient))

    @property
    @override
    def takes_apart(self) -> bool:
        return self.damping_rule != "common"

    @override
    def _solve_apart(
        self, weight: Tensor, bias: Tensor, damping: float, memory: BlockMemory
    ) -> tuple[Direction, Tensor]:
        inverse = self._form(damping, memory)
        assert isinstance(inverse, FactoredInverse), "which all rules but one make"
        X, last, scale = inverse.solve_apart(weight, bias)
        return Direction(X, scale), last

    @override
    def in_place_form(self, damping: float, memory: BlockMemory) -> FactoredInverse | None:
        c, p, q = self.shape
        if c > 1 or p * q < _LARGE or self.damping_rule == "common":
            return None
        inverse = self._form(damping, memory)
        if not isinstance(inverse, FactoredInverse) or not inverse.of_low_rank or inverse.scale is None:
            return None
        return inverse

    def _form(self, damping: float, memory: BlockMemory) -> JointInverse | FactoredInverse:
        def make() -> JointInverse | FactoredInverse:
            if self.damping_rule == "common":
                return JointInverse.of(self.A, self.G, damping)
            return FactoredInverse.of(self.A, self.G, *self.factor_damping(damping), steady=memory.steady)

        return memory.form(self, make, damping)


def prepared_numbers(*factors: tuple[int, int], damping_rule: DampingRule) -> int:
    """Returns how many numbers a `KroneckerSpectrum` is worked out into, of factors of so many rows and eigenpairs."""
    if damping_rule == "common":
        return math.prod(r for _, r in factors)
    return sum(FactorInverse.most_numbers(d, r) for d, r in factors)

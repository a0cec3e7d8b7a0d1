"""K-FAC with a block-tridiagonal inverse, for chains of layers (arXiv 1503.05671, 4.3; algorithms.md 1.3)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, NamedTuple, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from kfdist import checks
from kfdist.curvature.block_memory import BlockMemory
from kfdist.curvature.chains import chain_refusal
from kfdist.curvature.coupled import CoupledPreconditioner
from kfdist.curvature.inverse import AbstractPreconditioner
from kfdist.curvature.inverter import AbstractInverter, Coupling, Estimate, Inversion, Operation, Outcome, Work
from kfdist.curvature.spectra import EIGH_FLOPS, NEGATIVE_TOLERANCE, probes_like
from kfdist.curvature.statistics import ChainFactors, Needs
from kfdist.linalg.kronecker import split_by_trace
from kfdist.linalg.psd import eigh_descending, largest_eigenvalue, symmetrise, trace
from kfdist.types import BlockName, BlockShape

TRIANGULAR_FLOPS = 4.0
"""Operations over d^3 of a Cholesky factorisation and the triangular solves with a neighbour's factor."""


@dataclass(frozen=True, kw_only=True)
class ChainLink(CoupledPreconditioner):
    """Sigma_i^{-1} and Psi_i of F^{-1} = Xi^T diag(Sigma_i^{-1}) Xi; damped when they were made.

    Xi has I on its diagonal and -Psi_i = -(Psi_A (x) Psi_G) at (i, i + 1).
    Sigma_i^{-1} V = K_G [(K_G^T V K_A) / (1 - s_G s_A^T)] K_A^T.

    Attributes:
        Psi_A: A_{i-1,i} A_{i,i}^{-1}, from the next layer's inputs to this one's, `[c, q, q_next]`; `[c, q, 0]` for the
            last layer.
        Psi_G: G_{i,i+1} G_{i+1,i+1}^{-1}, `[c, p, p_next]`; `[c, p, 0]` for the last layer.
        K_A: Columns with K_A K_A^T the inverse of the damped A that diagonalise Psi_A A_{i,i} Psi_A^T, `[c, q, q]`.
        s_A: That diagonal, in [0, 1), `[c, q]`.
        K_G: Likewise for G, `[c, p, p]`.
        s_G: Likewise for G, `[c, p]`.
        damping_A: lambda_A, `[c]`.
        damping_G: lambda_G, `[c]`.
    """

    damping_at_apply: ClassVar[bool] = False

    Psi_A: Tensor
    Psi_G: Tensor
    K_A: Tensor
    s_A: Tensor
    K_G: Tensor
    s_G: Tensor
    damping_A: Tensor
    damping_G: Tensor

    @property
    @override
    def shape(self) -> tuple[int, int, int]:
        return self.K_G.shape[0], self.K_G.shape[-1], self.K_A.shape[-1]

    @override
    def joint_damping(self, damping: float) -> Float[Tensor, " c"]:
        del damping
        return self.damping_A * self.damping_G

    def conditional_solve(self, gradient: Float[Tensor, "c p q"], memory: BlockMemory) -> Float[Tensor, "c p q"]:
        """Computes Sigma_i^{-1} V: the block's inverse given all layers after it; not a direction by itself."""
        inverse = memory.form(self, lambda: 1 / (1 - self.s_G.unsqueeze(-1) * self.s_A.unsqueeze(-2)))
        return self.K_G @ (self.K_G.mT @ gradient @ self.K_A).mul_(inverse) @ self.K_A.mT

    @classmethod
    @override
    def _solve_group(  # pyright: ignore[reportIncompatibleMethodOverride]  # see CoupledPreconditioner.apply_group
        cls, members: Sequence[Self], gradients: Sequence[Tensor], damping: float, memories: Sequence[BlockMemory]
    ) -> list[Tensor]:
        del damping
        links = list(zip(members, gradients, strict=True))
        # Xi: each layer's gradient less what the next one's tells about it.
        inner = [
            torch.baddbmm(V, here.Psi_G @ V_next, here.Psi_A.mT, alpha=-1)
            for (here, V), (_, V_next) in zip(links[:-1], links[1:], strict=True)
        ]
        every = zip(members, [*inner, gradients[-1]], memories, strict=True)
        solved = [member.conditional_solve(V, memory) for member, V, memory in every]
        # Xi^T, from the end: all terms come from what was solved, there is no recursion along the chain.
        for here, V, V_next in reversed(list(zip(members[:-1], solved[:-1], solved[1:], strict=True))):
            V_next.baddbmm_(here.Psi_G.mT @ V, here.Psi_A, alpha=-1)
        return solved


class _Factor(NamedTuple):
    """One damped factor: its damping `[c]` and Cholesky factor L, L L^T = M + damping I, `[c, d, d]`."""

    damping: Tensor
    cholesky: Tensor
    definite: bool


class _Coupled(NamedTuple):
    """What one factor and its cross factor with the next one's give: see `ChainLink`."""

    Psi: Tensor
    K: Tensor
    s: Tensor
    outcome: Outcome
    diagnostics: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class KfacTridiagonal(AbstractInverter):
    """F^{-1} = Xi^T diag(Sigma_i^{-1}) Xi, the inverse of the Gaussian in which layer i depends only on layer i + 1.

    The factors are damped first, as by `kfac` with the rule "pi", and cross factors are not; damping therefore acts
    from the next version on. Layers must form a chain: each one's output, after activations, is the next one's input.

    Sigma_i = A (x) G - C (x) D with C = A_next A'^{-1} A_next^T and D = G_next G'^{-1} G_next^T, where A' and G' are
    the next layer's damped factors. With A = L L^T and A' = L' L'^T, the matrix M = L^{-1} A_next L'^{-T} holds the
    correlations between both layers' whitened inputs, and L^{-1} C L^{-T} = M M^T = E diag(s) E^T gives K = L^{-T} E.
    Any square root of A serves in the place of A^{1/2}.

    Attributes:
        assume_chain: The user vouches that a model with its own forward runs the layers one after another in the
            order in which they are registered; `kfdist.curvature.chains` can't see it.
    """

    name: ClassVar[str] = "kfac-tridiagonal"
    statistic: ClassVar[type] = ChainFactors
    produces: ClassVar[type[AbstractPreconditioner]] = ChainLink
    coupling: ClassVar[Coupling] = Coupling.CHAIN

    assume_chain: bool = False

    def __post_init__(self) -> None:
        checks.switch("assume_chain", self.assume_chain)

    @override
    def needs(self, shape: BlockShape) -> Needs:
        del shape
        return Needs(sums=frozenset({"A", "G", "A_next", "G_next"}))

    @override
    def refusal(self, shapes: Mapping[BlockName, BlockShape]) -> str:
        """Refuses convolutions, groups, and layers whose sizes don't fit together."""
        if not shapes:
            return "kfac-tridiagonal needs at least one layer, none matches; name the chain's Linear layers"
        for name, shape in shapes.items():
            if shape.convolution or shape.groups > 1:
                return f"kfac-tridiagonal couples Linear layers only and {name!r} is a convolution; give it `kfac`"
        for (name, shape), (following, after) in pairwise(shapes.items()):
            if after.d_in - shape.d_out not in (0, 1):  # 1 for the bias
                return (
                    f"kfac-tridiagonal needs a chain, but {name!r} has {shape.d_out} outputs and {following!r} after "
                    f"it takes {after.d_in} inputs (a bias counts as one); give the layers off the chain `kfac`"
                )
        return ""

    @override
    def invert(
        self, statistics: ChainFactors, *, damping: float, previous: Mapping[str, Tensor], seed: int
    ) -> Inversion:
        group = self.invert_group({"": statistics}, damping=damping, previous={"": previous}, seeds={"": seed})
        return group[""]

    @override
    def invert_group(
        self,
        statistics: Mapping[BlockName, ChainFactors],
        *,
        damping: float,
        previous: Mapping[BlockName, Mapping[str, Tensor]],
        seeds: Mapping[BlockName, int],
    ) -> dict[BlockName, Inversion]:
        """Inverts a chain, its blocks in the model's order.

        Raises:
            ValueError: A cross factor doesn't fit the next block, or the last block has one.
        """
        del previous
        _check_chain(statistics)
        damped = {name: _damped(each, damping) for name, each in statistics.items()}
        failed = {name: reason for name, pair in damped.items() if (reason := _indefinite(pair))}
        if failed:
            first = next(iter(failed))
            other = f"{first!r} of the same chain failed: {failed[first]}"
            return {name: Inversion.failed(failed.get(name, other)) for name in statistics}
        followers = [*list(damped)[1:], None]
        return {
            name: _link(each, damped[name], damped[after] if after else None, place, len(statistics), seeds[name])
            for place, ((name, each), after) in enumerate(zip(statistics.items(), followers, strict=True))
        }

    @override
    def model_refusal(self, model: nn.Module, names: Sequence[BlockName]) -> str:
        return chain_refusal(model, names, assume_chain=self.assume_chain)

    @override
    def estimate(self, shape: BlockShape) -> Estimate:
        """Counts a factorisation, triangular solves and an eigendecomposition of each factor.

        The next layer is taken to be as large as this one.
        """
        sizes = shape.d_in, shape.d_out
        work = [Work(Operation.CHOLESKY, TRIANGULAR_FLOPS * d**3) for d in sizes]
        work += [Work(Operation.EIGH, EIGH_FLOPS * d**3) for d in sizes]
        return Estimate(work, sum(2 * d * d + d for d in sizes), shape.d_in * shape.d_out)


def _check_chain(statistics: Mapping[BlockName, ChainFactors]) -> None:
    following = [*list(statistics.values())[1:], None]
    for (name, each), after in zip(statistics.items(), following, strict=True):
        expected = (after.A.shape[-1], after.G.shape[-1]) if after is not None else (0, 0)
        found = (each.A_next.shape[-1], each.G_next.shape[-1])
        if found != expected:
            raise ValueError(
                f"block {name!r}: its cross factors are for a next layer of sizes {found}, the next in the chain has "
                f"{expected}; give all blocks of the chain in the model's order"
            )


def _damped(factors: ChainFactors, damping: float) -> dict[str, _Factor]:
    q, p = factors.A.shape[-1], factors.G.shape[-1]
    split = split_by_trace(trace(factors.A), trace(factors.G), d_in=q, d_out=p, damping=damping)
    found: dict[str, _Factor] = {}
    for label, matrix, share in (("A", factors.A, split[0]), ("G", factors.G, split[1])):
        damped = symmetrise(matrix)
        damped.diagonal(dim1=-2, dim2=-1).add_(share.unsqueeze(-1))
        cholesky, info = torch.linalg.cholesky_ex(damped)
        found[label] = _Factor(share, cholesky, bool((info == 0).all()))
    return found


def _indefinite(pair: Mapping[str, _Factor]) -> str:
    for label, factor in pair.items():
        if not factor.definite:
            return f"factor {label} plus {factor.damping.min().item():.3g} I is not positive definite"
    return ""


def _link(
    factors: ChainFactors,
    own: Mapping[str, _Factor],
    after: Mapping[str, _Factor] | None,
    place: int,
    members: int,
    seed: int,
) -> Inversion:
    """Makes one block's share from its damped factors and the next block's."""
    A = _couple(factors.A, factors.A_next, own["A"], after["A"] if after else None, seed=seed, label="A")
    G = _couple(factors.G, factors.G_next, own["G"], after["G"] if after else None, seed=seed, label="G")
    link = ChainLink(
        trace_A=trace(factors.A),
        trace_G=trace(factors.G),
        place=place,
        members=members,
        Psi_A=A.Psi,
        Psi_G=G.Psi,
        K_A=A.K,
        s_A=A.s,
        K_G=G.K,
        s_G=G.s,
        damping_A=own["A"].damping,
        damping_G=own["G"].damping,
    )
    outcome = Outcome.worst(A.outcome, G.outcome)
    return Inversion(preconditioner=link, outcome=outcome, diagnostics={**A.diagnostics, **G.diagnostics})


def _couple(matrix: Tensor, cross: Tensor, own: _Factor, after: _Factor | None, *, seed: int, label: str) -> _Coupled:
    """Finds Psi, K and s of one factor (see `KfacTridiagonal`); the last block of a chain has no Psi and s = 0."""
    L = own.cholesky
    if after is None:
        Psi, s = cross, torch.zeros_like(L[..., 0])
        identity = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device)
        K = torch.linalg.solve_triangular(L.mT, identity.expand_as(L), upper=True)
        conditional = None
    else:
        Psi = torch.cholesky_solve(cross.mT, after.cholesky).mT
        half = torch.linalg.solve_triangular(after.cholesky, cross.mT, upper=False)  # L'^{-1} A_next^T
        M = torch.linalg.solve_triangular(L, half.mT, upper=False)
        s, E = eigh_descending(M @ M.mT)
        K = torch.linalg.solve_triangular(L.mT, E, upper=True)
        conditional = half
    probes = probes_like(matrix, seed=seed, label=label)
    solution = K @ (K.mT @ probes)
    damping = own.damping[:, None, None]
    residual = _relative(matrix @ solution + damping * solution - probes, probes)
    image = K @ probes
    orthogonality = _relative(K.mT @ (matrix @ image + damping * image) - probes, probes)
    smallest = 1 / largest_eigenvalue(K @ K.mT, probes[..., :1]) - own.damping
    if conditional is not None:  # K^T C K = diag(s) too, where C = half^T half
        turned = K.mT @ (conditional.mT @ (conditional @ (K @ probes)))
        residual = max(residual, _relative(turned - s.unsqueeze(-1) * probes, probes))
    # A second moment of both layers together has no correlation above 1; cross factors that weren't summed over the
    # same examples can. And where s_A s_G nears 1, the quotient by 1 - s_A s_G would be made of rounding errors.
    largest = s.max().item()
    highest = 1 - torch.finfo(s.dtype).eps ** 0.5
    return _Coupled(
        Psi=Psi,
        K=K,
        s=s.clamp(0, highest),
        outcome=Outcome.CLAMPED if largest > 1 + NEGATIVE_TOLERANCE else Outcome.DONE,
        diagnostics={
            f"residual_{label}": residual,
            # The columns of K are orthonormal in the inner product of the damped factor, else they are no eigenvectors.
            f"orthogonality_{label}": orthogonality * K.shape[-1] ** 0.5,
            f"smallest_eigenvalue_{label}": smallest.min().item(),
            f"largest_correlation_{label}": max(largest, 0.0) ** 0.5,
            f"rank_{label}": float(matrix.shape[-1]),
        },
    )


def _relative(difference: Tensor, of: Tensor) -> float:
    return (torch.linalg.matrix_norm(difference) / torch.linalg.matrix_norm(of)).max().item()

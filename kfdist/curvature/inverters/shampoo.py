"""Shampoo: inverse roots of the gradient's second moments along each of its dimensions."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from kfdist import checks
from kfdist.curvature.block_memory import BlockMemory
from kfdist.curvature.gradient_inverter import AbstractGradientInverter
from kfdist.curvature.inverse import AbstractPreconditioner
from kfdist.curvature.inverter import Estimate, Inversion, Operation, Outcome, Work
from kfdist.curvature.spectra import EIGH_FLOPS, full_spectrum
from kfdist.curvature.statistics import GradientMoments
from kfdist.errors import ConfigError
from kfdist.linalg.lowrank import gaussian_sketch
from kfdist.linalg.modes import mode_products
from kfdist.linalg.psd import largest_eigenvalue, trace
from kfdist.linalg.roots import newton_root, root_of_spectrum
from kfdist.seeds import split_seed
from kfdist.types import BlockShape
from kfdist.wire.records import symmetric_field


@dataclass(frozen=True, kw_only=True)
class ModeRoots(AbstractPreconditioner):
    """A symmetric matrix for each mode of the gradient's tensors: U = V times all of them.

    Attributes:
        root_1: `[c, d_1, d_1]`; `[c, 0, 0]` for modes that aren't there, likewise.
        root_2: The second mode's.
        root_3: The third's.
        root_4: The fourth's.
        mean_scale: What they do to a gradient that lies along mean eigenvalues, `[c]`, for `fallback`.
    """

    damping_at_apply: ClassVar[bool] = True
    solves: ClassVar[bool] = False

    root_1: Tensor = symmetric_field()
    root_2: Tensor = symmetric_field()
    root_3: Tensor = symmetric_field()
    root_4: Tensor = symmetric_field()
    mean_scale: Tensor

    @property
    def roots(self) -> list[Float[Tensor, "c d d"]]:
        """Those of the modes there are."""
        return [each for each in (self.root_1, self.root_2, self.root_3, self.root_4) if each.shape[-1]]

    @property
    def modes(self) -> tuple[int, ...]:
        """The dimensions of the tensors."""
        return tuple(each.shape[-1] for each in self.roots)

    @property
    @override
    def shape(self) -> tuple[int, int, int]:
        modes = self.modes
        return len(self.root_1), modes[0], math.prod(modes[1:])

    @override
    def _solve(self, gradient: Tensor, damping: float, memory: BlockMemory) -> Tensor:
        del damping, memory
        tensors = gradient.reshape(len(gradient), *self.modes)
        return mode_products(tensors, self.roots).reshape(self.shape)

    @override
    def fallback(self, gradient: Float[Tensor, "c p q"], damping: float) -> Float[Tensor, "c p q"]:
        """Scales a gradient as if every eigenvalue were the mean one."""
        del damping
        scale = self.mean_scale.view(-1, 1, 1)
        return (gradient.to(scale.dtype) * scale).to(gradient.dtype)


_CONVERGED = 1e-3
"""Largest error of a Newton iteration that has come to its root: what is left then is rounding."""


class _Root(NamedTuple):
    """(M + added I)^-exponent, and how it was found."""

    matrix: Tensor
    added: Tensor
    outcome: Outcome
    diagnostics: dict[str, float]


class _FactorRoot(NamedTuple):
    """A mode's root, with what it does to a mean eigenvalue."""

    matrix: Tensor
    mean_scale: Tensor
    outcome: Outcome
    diagnostics: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Shampoo(AbstractGradientInverter):
    r"""U = V with (M_i + eps I)^(-1/(2k)) along each of its k dimensions (Gupta et al., arXiv 1802.09568, algorithm 2).

    For a matrix that is L^(-1/4) V R^(-1/4) with L = sum V V^T and R = sum V^T V.

    Attributes:
        exponent: What a root's exponent is, in place of 1/(2k); 0.5 for the whole inverse root on each side.
        accumulate: "average" takes the mean over past steps, weighted by `ema_decay`, and "sum", as published, the sum
            over all steps, by which steps get shorter.
        epsilon: Added to the eigenvalues.
        epsilon_rule: "relative" takes `epsilon` as a share of the largest eigenvalue (Anil et al., arXiv 2002.09018),
            "absolute", as published, as it is.
        root: "eigen" by eigenvalues, "newton" by the coupled Newton iteration, products alone, where 1/exponent is a
            whole number; where rounding doesn't let it converge, by eigenvalues.
    """

    name: ClassVar[str] = "shampoo"
    produces: ClassVar[type[AbstractPreconditioner]] = ModeRoots

    exponent: float | None = None
    accumulate: Literal["average", "sum"] = "average"
    epsilon: float = 1e-6
    epsilon_rule: Literal["relative", "absolute"] = "relative"
    root: Literal["eigen", "newton"] = "eigen"

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.choice("accumulate", self.accumulate, ("average", "sum"))
        checks.choice("epsilon_rule", self.epsilon_rule, ("relative", "absolute"))
        checks.choice("root", self.root, ("eigen", "newton"))
        checks.number("epsilon", self.epsilon, above=0)
        if self.exponent is not None:
            checks.number("exponent", self.exponent, above=0, most=1)
            if self.root == "newton" and abs(1.0 / self.exponent - round(1.0 / self.exponent)) > 1e-9:
                raise ConfigError(
                    f"is {self.exponent}, and root = 'newton' computes M^(-1/p) for whole p; give 1/p, such as 0.25, "
                    "or root = 'eigen'",
                    path="exponent",
                )

    @override
    def decay(self, ema_decay: float) -> float:
        return 1.0 if self.accumulate == "sum" else ema_decay

    @override
    def invert(
        self, statistics: GradientMoments, *, damping: float, previous: Mapping[str, Tensor], seed: int
    ) -> Inversion:
        del damping, previous
        divisor = statistics.weight if self.accumulate == "average" else torch.ones_like(statistics.weight)
        moments = [each / divisor.view(-1, 1, 1) for each in statistics.sums]
        exponent = 1.0 / (2 * len(moments)) if self.exponent is None else self.exponent
        roots = [self._root(M, exponent, str(mode), seed) for mode, M in enumerate(moments, start=1)]
        absent = [moments[0].new_zeros(len(moments[0]), 0, 0)] * (4 - len(roots))
        found = dict(zip(("root_1", "root_2", "root_3", "root_4"), [*(r.matrix for r in roots), *absent], strict=True))
        total = trace(moments[0])
        return Inversion(
            preconditioner=ModeRoots(
                trace_A=total,
                trace_G=torch.ones_like(total),
                **found,
                mean_scale=math.prod((r.mean_scale for r in roots), start=torch.ones_like(total)),
            ),
            outcome=Outcome.worst(*(r.outcome for r in roots)),
            diagnostics={name: value for r in roots for name, value in r.diagnostics.items()},
        )

    def _root(self, M: Float[Tensor, "c d d"], exponent: float, label: str, seed: int) -> _FactorRoot:
        """Returns (M + eps I)^-exponent; I where nothing but zeros was seen, of which there is no scale."""
        d, mean = M.shape[-1], trace(M) / M.shape[-1]
        seen = mean > 0
        identity = torch.eye(d, dtype=M.dtype, device=M.device)
        safe = torch.where(seen.view(-1, 1, 1), M, identity)
        found = self._by_products(safe, exponent, label, seed) if self.root == "newton" else None
        matrix, added, outcome, diagnostics = found or self._by_eigenvalues(safe, exponent, label, seed)
        scale = torch.where(seen, (mean + added).pow(-exponent), 1.0)
        return _FactorRoot(torch.where(seen.view(-1, 1, 1), matrix, identity), scale, outcome, diagnostics)

    def _by_products(self, M: Tensor, exponent: float, label: str, seed: int) -> _Root | None:
        """Returns None where the iteration doesn't come near: rounding has made eigenvalues negative."""
        largest = largest_eigenvalue(M, gaussian_sketch(M, 1, seed=split_seed(seed, f"largest/{label}")))
        added = self._added(largest)
        root = newton_root(M + torch.diag_embed(added.unsqueeze(-1).expand(M.shape[:-1])), round(1.0 / exponent))
        error = float(root.error.max())
        if not error <= _CONVERGED:
            return None
        return _Root(root.matrix, added, Outcome.DONE, {f"residual_{label}": error})

    def _by_eigenvalues(self, M: Tensor, exponent: float, label: str, seed: int) -> _Root:
        found = full_spectrum(M, rank=M.shape[-1], seed=seed, label=label)
        added = self._added(found.spectrum.values[:, 0])
        matrix = root_of_spectrum(found.spectrum.values + added.unsqueeze(-1), found.spectrum.vectors, exponent)
        return _Root(matrix, added, found.outcome, found.diagnostics)

    def _added(self, largest: Float[Tensor, " c"]) -> Float[Tensor, " c"]:
        return self.epsilon * largest if self.epsilon_rule == "relative" else torch.full_like(largest, self.epsilon)

    @override
    def estimate(self, shape: BlockShape) -> Estimate:
        """Counts a full eigendecomposition of each mode; Newton's iteration takes about as many products."""
        work = [Work(Operation.EIGH, EIGH_FLOPS * d**3) for d in shape.dimensions]
        return Estimate(work, sum(d * d for d in shape.dimensions))

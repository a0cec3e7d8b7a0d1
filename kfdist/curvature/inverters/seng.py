"""SENG: the Fisher matrix of a few examples, inverted in the space of examples (arXiv 2006.05924; algorithms.md 6)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from kfdist import checks
from kfdist.curvature.inverse import AbstractPreconditioner
from kfdist.curvature.inverter import AbstractInverter, Estimate, Inversion, Operation, Work
from kfdist.curvature.inverters.seng_directions import (
    BackProjection,
    Scaling,
    SengExplicit,
    SengImplicit,
    SengPreconditioner,
)
from kfdist.curvature.spectra import EIGH_FLOPS, probes_like
from kfdist.curvature.statistics import Needs, SampleBudget, Samples
from kfdist.errors import ConfigError
from kfdist.linalg.psd import eigen_residual
from kfdist.linalg.row_products import gram, gram_of_sums, sampled_first, square_norms, whiten_gram
from kfdist.seeds import split_seed
from kfdist.types import BlockShape


class _Spectrum(NamedTuple):
    """Whitened Gram matrices of the sources, side by side.

    Attributes:
        values: w, `[c, r]`.
        whitening: Z, `[c, n, r]`, block-diagonal.
        errors: Of the decomposition, the worst, for the diagnostics; see `_errors`.
    """

    values: Tensor
    whitening: Tensor
    errors: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Seng(AbstractInverter):
    """F = U U^T with a column for each example's gradient; (F + lambda I)^{-1} V by an examples x examples system.

    Without a sketch and with all columns kept this is exact for the empirical Fisher matrix of the examples.

    Attributes:
        examples: Most examples a job, over all ranks.
        columns: kappa, columns kept of an example's gradient where it has more positions; None keeps all.
        form: "explicit" stores each example's gradient, "implicit" only its columns; "auto" decides by `threshold`.
        threshold: Entries p q of the gradient above which "auto" takes the implicit form.
        column_sample_size: k: sums over the entries are estimated from k^2 of them (explicit), or from k inputs times k
            outputs (implicit); None takes all.
        scaling: Of the sketch: "unbiased", or "published" as the authors' code has it (algorithms.md 6.2).
        back_projection: Of the implicit form: "exact", or "mean-field" as the authors' code has it (algorithms.md 6.3).
        aggregate: "global" inverts the Fisher matrix of all ranks' examples; "local-average" averages the directions of
            one operator per rank, the published scheme (algorithms.md 6.6).
    """

    name: ClassVar[str] = "seng"
    statistic: ClassVar[type] = Samples
    produces: ClassVar[type[AbstractPreconditioner]] = SengPreconditioner

    examples: int = 256
    columns: int | None = 16
    form: Literal["auto", "explicit", "implicit"] = "auto"
    threshold: int = 700_000
    column_sample_size: int | None = None
    scaling: Scaling = "unbiased"
    back_projection: BackProjection = "exact"
    aggregate: Literal["global", "local-average"] = "global"

    def __post_init__(self) -> None:
        checks.count("examples", self.examples, least=1)
        checks.count("threshold", self.threshold, least=0)
        for field in ("columns", "column_sample_size"):
            if getattr(self, field) is not None:
                checks.count(field, getattr(self, field), least=1)
        checks.choice("form", self.form, ("auto", "explicit", "implicit"))
        checks.choice("scaling", self.scaling, ("unbiased", "published"))
        checks.choice("back_projection", self.back_projection, ("exact", "mean-field"))
        checks.choice("aggregate", self.aggregate, ("global", "local-average"))
        if self.form == "explicit" and self.back_projection == "mean-field":
            raise ConfigError(
                "'mean-field' has no effect on the explicit form; use form 'auto' or 'implicit'", path="back_projection"
            )

    @override
    def needs(self, shape: BlockShape) -> Needs:
        del shape
        return Needs(sums=frozenset(), samples=SampleBudget(examples=self.examples, columns=self.columns))

    @override
    def note(self, shape: BlockShape) -> str:
        """Names the form, the sketch and the approximations, such as "explicit, sketched 4096 of 73800 entries"."""
        entries, sampled = shape.d_out * shape.d_in, self._sampled(shape.d_out, shape.d_in)
        words = ["explicit" if self._explicit(entries) else "implicit"]
        if sampled < entries:
            words.append(f"sketched {sampled} of {entries} entries")
        if not self._explicit(entries) and self.back_projection == "mean-field":
            words.append("mean-field back-projection")
        if self.aggregate == "local-average":
            words.append("average of the ranks' own operators")
        return ", ".join(words)

    @override
    def invert(self, statistics: Samples, *, damping: float, previous: Mapping[str, Tensor], seed: int) -> Inversion:
        del damping, previous
        fault = _fault(statistics)
        if fault:
            return Inversion.failed(fault)
        samples, sources = self._normalised(statistics)
        trace = square_norms(samples.a, samples.g).sum(-1) / len(sources)
        explicit = self._explicit(samples.a.shape[-1] * samples.g.shape[-1])
        make = self._explicit_form if explicit else self._implicit_form
        made, errors = make(samples, sources, trace.to(samples.a.dtype), seed)
        kept = made.values > 0
        smallest = torch.where(kept, made.values, float("inf")).min() if bool(kept.any()) else made.values.new_zeros(())
        diagnostics = {
            **errors,
            "smallest_eigenvalue_gram": float(smallest),
            "rank_gram": float(kept.sum(-1).max()),
        }
        return Inversion(preconditioner=made, diagnostics=diagnostics)

    @override
    def estimate(self, shape: BlockShape) -> Estimate:
        """Counts the Gram matrix, its decomposition, the trace and, in the explicit form, the rotated gradients."""
        n, p, q = self.examples, shape.d_out, shape.d_in
        columns = (self.columns or 1) if shape.convolution else 1
        if self._explicit(p * q):
            flops = 2.0 * n * p * q * columns + 2.0 * n * n * (self._sampled(p, q) + p * q)
            numbers = min(n, p * q) * (p * q + 1)
        else:
            k = self.column_sample_size or p + q
            flops = 2.0 * (n * columns) ** 2 * (min(k, p) + min(k, q)) + 2.0 * n * columns**2 * (p + q)
            numbers = n * columns * (p + q) + n * n
        return Estimate([Work(Operation.PRODUCTS, flops), Work(Operation.EIGH, EIGH_FLOPS * n**3)], numbers)

    def _explicit(self, entries: int) -> bool:
        return self.form == "explicit" or (self.form == "auto" and entries <= self.threshold)

    def _sampled(self, p: int, q: int) -> int:
        """Returns how many of p q entries the sketch takes."""
        k = self.column_sample_size
        if k is None:
            return p * q
        return min(k * k, p * q) if self._explicit(p * q) else min(k, p) * min(k, q)

    def _normalised(self, samples: Samples) -> tuple[Samples, list[Tensor]]:
        """Drops rows that fill up, multiplies each g by sqrt(weight/N), and lists the sources' examples.

        N is that of all examples, or of the example's own source where each has its own operator.
        """
        present = (samples.weight > 0).nonzero().flatten()
        a, g = samples.a[:, present], samples.g[:, present]
        weight, source = samples.weight[present], samples.source[present]
        terms = weight.double() * samples.terms[present].double()
        if self.aggregate == "local-average":
            sources = [(source == each).nonzero().flatten() for each in source.unique()]
        else:
            sources = [torch.arange(len(weight), device=weight.device)]
        wide, normal = weight.double(), torch.zeros_like(weight, dtype=torch.float64)
        for members in sources:
            normal[members] = wide[members] / terms[members].sum()
        g = g * normal.sqrt().to(g.dtype)[:, None, None]
        return replace(samples, a=a, g=g, weight=weight, source=source), sources

    def _explicit_form(
        self, samples: Samples, sources: list[Tensor], trace: Tensor, seed: int
    ) -> tuple[SengPreconditioner, dict[str, float]]:
        p, q = samples.g.shape[-1], samples.a.shape[-1]
        U = (samples.g.mT @ samples.a).flatten(2)
        sampled, order = self._sampled(p, q), torch.zeros(0, dtype=torch.int64, device=U.device)
        # With as many examples as entries, the Fisher matrix itself is the smaller of the two and has all directions.
        complete = all(len(members) >= p * q for members in sources)
        if complete:
            sampled = p * q
            values, rows, errors = _decompose_fisher(U, sources, seed)
        else:
            if sampled < p * q:
                order = sampled_first(p * q, sampled, seed=split_seed(seed, "entries"), device=U.device)
                U = U[..., order]
            scale = p * q / sampled
            grams = [scale * gram(U[:, members, :sampled]) for members in sources]
            values, whitening, errors = _whiten(grams, sources, seed)
            rows = _rotate(whitening, U)
        made = SengExplicit(
            trace_A=trace,
            trace_G=torch.ones_like(trace),
            values=values.to(U.dtype),
            scaling=self.scaling,
            rows=rows,
            order=order,
            sampled=sampled,
            sources=len(sources),
            complete=complete,
            d_out=p,
            d_in=q,
        )
        return made, errors

    def _implicit_form(
        self, samples: Samples, sources: list[Tensor], trace: Tensor, seed: int
    ) -> tuple[SengPreconditioner, dict[str, float]]:
        a, g = samples.a, samples.g
        p, q, k = g.shape[-1], a.shape[-1], self.column_sample_size
        sampled_A, sampled_G = min(k or q, q), min(k or p, p)
        order_A = order_G = torch.zeros(0, dtype=torch.int64, device=a.device)
        if sampled_A * sampled_G < p * q:
            order_A = sampled_first(q, sampled_A, seed=split_seed(seed, "entries/A"), device=a.device)
            order_G = sampled_first(p, sampled_G, seed=split_seed(seed, "entries/G"), device=a.device)
            a, g = a[..., order_A], g[..., order_G]
        scale = (q / sampled_A) * (p / sampled_G)
        parts = [(a[:, each, :, :sampled_A], g[:, each, :, :sampled_G]) for each in sources]
        values, whitening, errors = _whiten([scale * gram_of_sums(*part) for part in parts], sources, seed)
        members = torch.zeros(len(sources), a.shape[1], dtype=a.dtype, device=a.device)
        for row, each in enumerate(sources):
            members[row, each] = 1
        made = SengImplicit(
            trace_A=trace,
            trace_G=torch.ones_like(trace),
            values=values.to(a.dtype),
            scaling=self.scaling,
            a=a,
            g=g,
            whitening=whitening.to(a.dtype),
            members=members,
            order_A=order_A,
            order_G=order_G,
            sampled_A=sampled_A,
            sampled_G=sampled_G,
            back_projection=self.back_projection,
        )
        return made, errors


def _fault(samples: Samples) -> str:
    """Returns why nothing can be made of the samples, or nothing."""
    if bool((samples.weight < 0).any()):
        return f"weight holds {float(samples.weight.min()):.3g}; an example can't count less than 0 times"
    if not bool((samples.weight > 0).any()):
        return f"no samples: weight is 0 for all {samples.weight.numel()} examples"
    return ""


def _whiten(grams: list[Tensor], sources: list[Tensor], seed: int) -> _Spectrum:
    """Decomposes the sources' Gram matrices and puts them side by side."""
    n, c = sum(len(members) for members in sources), grams[0].shape[0]
    values: list[Tensor] = []
    columns: list[Tensor] = []
    errors: list[dict[str, float]] = []
    for matrix, members in zip(grams, sources, strict=True):
        w, Z = whiten_gram(matrix)
        errors.append(_errors(matrix, w, Z * w.sqrt().unsqueeze(-2), seed))
        placed = Z.new_zeros(c, n, w.shape[-1])
        placed[:, members] = Z
        values.append(w)
        columns.append(placed)
    return _Spectrum(torch.cat(values, -1), torch.cat(columns, -1), _worst(errors))


def _decompose_fisher(U: Tensor, sources: list[Tensor], seed: int) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Decomposes U^T U `[c, D, D]` of each source; returns all eigenpairs, vectors in rows, and the worst errors."""
    values: list[Tensor] = []
    rows: list[Tensor] = []
    errors: list[dict[str, float]] = []
    for members in sources:
        F = gram(U[:, members].mT)
        w, Q = torch.linalg.eigh(F)
        w, Q = w.flip(-1).clamp_min(0), Q.flip(-1)
        errors.append(_errors(F, w, Q, seed))
        values.append(w)
        rows.append(Q.mT)
    return torch.cat(values, -1), torch.cat(rows, 1).to(U.dtype), _worst(errors)


def _errors(matrix: Tensor, values: Tensor, vectors: Tensor, seed: int) -> dict[str, float]:
    """Returns the residual of an eigendecomposition and ||Q^T Q - I||, Frobenius; columns of zeros are no vectors."""
    probes = probes_like(matrix, seed=seed, label="gram")
    unit = torch.diag_embed((vectors.square().sum(-2) > 0).to(vectors.dtype))
    return {
        "residual_gram": float(eigen_residual(matrix, values, vectors, probes).max()),
        "orthogonality_gram": float(torch.linalg.matrix_norm(vectors.mT @ vectors - unit).max()),
    }


def _worst(errors: list[dict[str, float]]) -> dict[str, float]:
    return {name: max(each[name] for each in errors) for name in errors[0]}


def _rotate(whitening: Tensor, U: Tensor) -> Tensor:
    """Returns Z^T U `[c, r, D]`, computed in float64 a part of the entries at a time, in the dtype of U."""
    wide = max(1, (1 << 22) // max(1, U.shape[0] * U.shape[1]))
    return torch.cat([(whitening.mT @ part.double()).to(U.dtype) for part in U.split(wide, -1)], -1)

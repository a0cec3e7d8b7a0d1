r"""How many eigenpairs a snapshot needs: as many as hold its directions near those of all (docs/decisions/0026).

A factor is known by its r leading eigenpairs; its other eigenvalues are at most w_r. Let k pairs be kept, and every
other eigenvalue x, of the pairs cut off and of what was never found, be replaced by one number t. With h = w_{k+1}, or
w_r where nothing is cut off, x lies in [0, h]. In the eigenbasis of the whole factor a direction's components are those
of the gradient over x + gamma, where gamma is the damping of the factor, so each changes by

    (x + gamma) / (t + gamma) - 1,    at most    e = max(t, h - t) / (t + gamma) in magnitude.

t = h/2 makes e smallest: h / (h + 2 gamma). Over both factors the changes multiply: a component of the block's
direction changes by at most (1 + e_A)(1 + e_G) - 1, relative to itself. With "common" damping a component is the
gradient's over x_G x_A + lambda. If only A's pair was replaced, it changes by at most v max(t, h - t) / (v t + lambda),
which grows with G's eigenvalue v and so is largest at G's largest; likewise for G; if both were, by at most
max(h_A h_G - t_A t_G, t_A t_G) / (t_A t_G + lambda). The bound is the largest of the three.

A bound on every component in an orthonormal basis bounds the whole direction in the Euclidean norm, relative to its
own, and in every norm that weighs the same components, such as that of the damped block. It holds against the factor
with whatever eigenvalues the pairs that were not found have; how good the found ones are is for `residual_*` and
`approximation_error_*` to say.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from kfdist.linalg.kronecker import DampingRule, Spectrum, split_by_largest, split_by_trace

MULTIPLE = 32
"""Numbers of pairs are rounded up to its multiples, so that blocks of equal shape can still be one batched product."""

MARGIN = 2.0
"""By how much damping may fall before a snapshot has too few pairs: one that falls slowly needs no inversion of its
own."""


Missing = tuple[Float[Tensor, " c"] | None, Float[Tensor, " c"] | None]
"""Of A and of G, `[c]`: a bound on the eigenvalues' magnitudes of what a factor is without the pairs found."""


class Kept(NamedTuple):
    """The eigenpairs of both factors that are kept.

    Attributes:
        A: Of the factor of the inputs.
        G: Of the factor of the output gradients.
        error: Bound on every component of a direction, relative to itself, at the damping that it was made for; where
            something is missing, on the whole direction.
        mean_error: By how much the components that lie outside both bases change on average, relative to themselves, at
            that damping; known of the traces, whatever the eigenvalues are that were never found.
        least_damping: Smallest damping for which there are enough; 0 where nothing was cut off.
    """

    A: Spectrum
    G: Spectrum
    error: float
    mean_error: float
    least_damping: float


class _Choices(NamedTuple):
    """What may be kept of one factor: n numbers of pairs, rising, the last of them all.

    Attributes:
        ranks: The numbers of pairs k.
        largest: h, the largest eigenvalue that isn't kept, `[c, n]`; 0 where there is none.
        tails: t, what the eigenvalues that aren't kept are taken to be, `[c, n]`.
        leading: The largest eigenvalue of all, `[c, 1]`.
        missing: m, `[c, 1]`; 0 where what isn't known is orthogonal to the pairs.
    """

    ranks: list[int]
    largest: Float[Tensor, "c n"]
    tails: Float[Tensor, "c n"]
    leading: Float[Tensor, "c 1"]
    missing: Float[Tensor, "c 1"]

    @classmethod
    def of(cls, spectrum: Spectrum, missing: Float[Tensor, " c"] | None, *, cuts: bool) -> "_Choices":
        values, tail = spectrum.values.double().cpu(), spectrum.tail.double().cpu().unsqueeze(-1)
        fewer = list(range(MULTIPLE, values.shape[-1], MULTIPLE)) if cuts else []
        cut_off, last = values[..., fewer], torch.maximum(values[..., -1:], tail)
        if spectrum.complete:
            tail = torch.zeros_like(tail)
        if spectrum.complete or missing is not None:
            last = torch.zeros_like(last)
        unknown = torch.zeros_like(last) if missing is None else missing.double().cpu().unsqueeze(-1)
        largest, tails = torch.cat([cut_off, last], -1), torch.cat([cut_off / 2, tail], -1)
        return cls([*fewer, values.shape[-1]], largest, tails, values[..., :1], unknown)

    def deviations(self, damping: Float[Tensor, "c 1"], factor: Float[Tensor, "c 1"]) -> Float[Tensor, "c n"]:
        """Returns e for the eigenvalues `factor` x + `damping`."""
        return factor * (self._replaced() + self.missing) / (factor * self.tails + damping)

    def replaced_deviations(self, damping: Float[Tensor, "c 1"], factor: Float[Tensor, "c 1"]) -> Float[Tensor, "c n"]:
        """Returns e as `deviations` does, as if nothing were missing."""
        return factor * self._replaced() / (factor * self.tails + damping)

    def _replaced(self) -> Float[Tensor, "c n"]:
        return torch.maximum(self.tails, self.largest - self.tails)


def keep_enough(
    A: Spectrum,
    G: Spectrum,
    *,
    traces: tuple[Float[Tensor, " c"], Float[Tensor, " c"]],
    damping_rule: DampingRule,
    damping: float,
    direction_error: float,
    missing: Missing = (None, None),
) -> Kept:
    """Cuts off the eigenpairs of a block's factors that its directions don't need.

    Of all choices that hold the bound at damping / `MARGIN`, the one with the fewest pairs of both factors together,
    which is what applying costs. Where even all pairs don't hold it, each factor keeps as many as make its own share of
    the error small, or all; what is missing doesn't count there, since no pair brings it back. Waits for the tensors.

    Args:
        A: Of the factor of the inputs, as it was found.
        G: Of the factor of the output gradients.
        traces: Of the undamped factors A and G.
        damping_rule: How damping acts.
        damping: lambda, or phi, of the version.
        direction_error: Largest bound; 0 keeps all pairs.
        missing: m of A and of G; None where what wasn't found is orthogonal to the pairs and at most w_r.
    """
    cuts = direction_error > 0
    sides = _Choices.of(A, missing[0], cuts=cuts), _Choices.of(G, missing[1], cuts=cuts)
    sizes = A.vectors.shape[-2], G.vectors.shape[-2]

    def split(damping: float) -> tuple[Tensor, Tensor]:
        if damping_rule == "relative":
            return split_by_largest(A.values[..., 0], G.values[..., 0], damping=damping)
        return split_by_trace(*traces, d_in=sizes[0], d_out=sizes[1], damping=damping)

    def bounds(sides: tuple[_Choices, _Choices], damping: float) -> tuple[Tensor, Tensor, Tensor]:
        if damping_rule == "common":
            return _common_bounds(*sides, damping)
        gammas = [each.double().cpu().unsqueeze(-1) for each in split(damping)]
        e_A, e_G = (side.deviations(gamma, torch.ones_like(gamma)) for side, gamma in zip(sides, gammas, strict=True))
        return e_A.amax(0), e_G.amax(0), ((1 + e_A.unsqueeze(-1)) * (1 + e_G.unsqueeze(-2)) - 1).amax(0)

    least = damping / MARGIN
    places = _fewest(*sides, bounds(sides, least)[2], direction_error)
    if places is None:
        found = _Choices.of(A, None, cuts=cuts), _Choices.of(G, None, cuts=cuts)
        known = bounds(found, least)
        places = _fewest(*found, known[2], direction_error) or _shares(known, direction_error)
    i, j = places
    is_cut = i < len(sides[0].ranks) - 1 or j < len(sides[1].ranks) - 1
    kept = _leading(A, sides[0].ranks[i]), _leading(G, sides[1].ranks[j])
    return Kept(
        A=kept[0],
        G=kept[1],
        error=float(bounds(sides, damping)[2][i, j]),
        mean_error=_mean_error(kept, traces, None if damping_rule == "common" else split(damping), damping),
        least_damping=least if is_cut else 0.0,
    )


def _mean_error(
    kept: tuple[Spectrum, Spectrum],
    traces: tuple[Float[Tensor, " c"], Float[Tensor, " c"]],
    gammas: tuple[Float[Tensor, " c"], Float[Tensor, " c"]] | None,
    damping: float,
) -> float:
    """Returns how far the mean over the components outside both bases is from 0, of the worst of c.

    A change is linear in the eigenvalue that t stands for, so its mean needs only theirs: the rest of the trace, over
    as many as there are; what is missing counts as if it lay there. It may hide that some components grow and others
    shrink, and isn't of any one gradient.
    Nothing is outside of a complete basis; then, and if `gammas` are None, it is of the leading eigenvector there.
    """
    outside = [(_rest(each, of_one), each.tail.double().cpu()) for each, of_one in zip(kept, traces, strict=True)]
    (m_A, t_A), (m_G, t_G) = outside
    if gammas is None:
        leading = [each.values[..., 0].double().cpu() if each.complete else None for each in kept]
        (m_A, t_A), (m_G, t_G) = (
            pair if alone is None else (alone, alone) for pair, alone in zip(outside, leading, strict=True)
        )
        change = (m_A * m_G - t_A * t_G) / (t_A * t_G + damping)
    else:
        of_A, of_G = (each.double().cpu() for each in gammas)
        change = (m_A + of_A) / (t_A + of_A) * ((m_G + of_G) / (t_G + of_G)) - 1
    return float(change.abs().max())


def _rest(kept: Spectrum, trace: Float[Tensor, " c"]) -> Float[Tensor, " c"]:
    """Returns the mean of the eigenvalues that aren't kept; the tail where all are."""
    outside = kept.vectors.shape[-2] - kept.values.shape[-1]
    if not outside:
        return kept.tail.double().cpu()
    return (trace.double().cpu() - kept.values.double().cpu().sum(-1)).clamp_min(0) / outside


def _common_bounds(A: _Choices, G: _Choices, damping: float) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the bounds of exact damping: of each factor alone, `[n_A]` and `[n_G]`, and of both, `[n_A, n_G]`."""
    joint = torch.full_like(A.leading, damping)
    e_A, e_G = A.replaced_deviations(joint, G.leading), G.replaced_deviations(joint, A.leading)
    tails = A.tails.unsqueeze(-1) * G.tails.unsqueeze(-2)
    largest = A.largest.unsqueeze(-1) * G.largest.unsqueeze(-2)
    both = torch.maximum(largest - tails, tails) / (tails + damping)
    either = torch.maximum(e_A.unsqueeze(-1), e_G.unsqueeze(-2))
    of_A = _beside(G.leading, A.tails.unsqueeze(-1), G.largest.unsqueeze(-2), tails, damping) * A.missing.unsqueeze(-1)
    of_G = _beside(A.leading, G.tails.unsqueeze(-2), A.largest.unsqueeze(-1), tails, damping) * G.missing.unsqueeze(-1)
    of_both = (A.missing * G.missing).unsqueeze(-1) / (tails + damping)
    together = torch.maximum(either, both) + of_A + of_G + of_both
    return A.deviations(joint, G.leading).amax(0), G.deviations(joint, A.leading).amax(0), together.amax(0)


def _beside(
    leading: Float[Tensor, "c 1"],
    tails: Float[Tensor, "c ..."],
    largest: Float[Tensor, "c ..."],
    products: Float[Tensor, "c n m"],
    damping: float,
) -> Float[Tensor, "c n m"]:
    """Returns the largest of v / (v' t + lambda), for the other factor's eigenvalues v and what they are kept as, v'.

    Args:
        leading: The largest v of those that are kept.
        tails: t.
        largest: h, the largest of those that aren't.
        products: t_A t_G, which are t times what those are kept as.
        damping: lambda.
    """
    leading = leading.unsqueeze(-1)
    return torch.maximum(leading / (leading * tails + damping), largest / (products + damping))


def _fewest(A: _Choices, G: _Choices, bounds: Float[Tensor, "n m"], most: float) -> tuple[int, int] | None:
    """Returns the places of the choices with the fewest pairs of those that hold the bound; None where none does."""
    table = bounds.tolist()
    enough = [(k + m, table[i][j], i, j) for i, k in enumerate(A.ranks) for j, m in enumerate(G.ranks)]
    enough = [each for each in enough if each[1] <= most]
    if not enough:
        return None
    _, _, i, j = min(enough)
    return i, j


def _shares(bounds: tuple[Tensor, Tensor, Tensor], most: float) -> tuple[int, int]:
    """Returns the places of the choices that make each factor's own share of the bound small, or of all pairs."""
    share = math.sqrt(1 + most) - 1
    i, j = (next((i for i, e in enumerate(alone.tolist()) if e <= share), len(alone) - 1) for alone in bounds[:2])
    return i, j


def _leading(spectrum: Spectrum, k: int) -> Spectrum:
    if k == spectrum.values.shape[-1]:
        return spectrum
    values = spectrum.values
    return Spectrum(spectrum.vectors[..., :k], values[..., :k], values[..., k] / 2)

"""Cutting off eigenpairs keeps every component of a direction within the stated bound of the exact one, in float64."""

import itertools

import pytest
import torch
from torch import Tensor

from kfdist.curvature.inverse import KroneckerSpectrum
from kfdist.curvature.kept_pairs import MARGIN, MULTIPLE, Kept, keep_enough
from kfdist.linalg.kronecker import DampingRule, Spectrum, split_by_largest, split_by_trace
from tests.support.matrices import gaussian

C, P, Q, RANK = 2, 70, 104, 80
ERROR = 0.05
RULES: tuple[DampingRule, ...] = ("pi", "relative", "common")
V = gaussian(C, P, Q, seed=1)


def spectra(d: int) -> dict[str, Tensor]:
    """Returns eigenvalues of both groups, by how they fall."""
    i = torch.arange(d, dtype=torch.float64)
    few = torch.where(i < 40, 1.0, 1e-9).double()
    each = {"fast": 0.9**i, "slow": 1 / (1 + i), "flat": 1 - i / (2 * d), "few": few, "zero": 0 * i}
    return {name: torch.stack([values, 0.3 * values]) for name, values in each.items()}


PAIRS = [(A, G) for A in spectra(Q) for G in spectra(P)]

BASES = torch.linalg.qr(gaussian(C, Q, Q, seed=2)).Q, torch.linalg.qr(gaussian(C, P, P, seed=3)).Q
"""The eigenvectors of A and of G: what is exact can be written down, whatever the eigenvalues."""


def found(values: Tensor, basis: Tensor, *, continued: bool) -> Spectrum:
    leading = values[..., :RANK]
    return Spectrum(basis[..., :RANK], leading, leading[..., -1] if continued else torch.zeros_like(leading[..., 0]))


def kept_of(
    names: tuple[str, str], rule: DampingRule, damping: float, *, continued: bool = False, error: float = ERROR
) -> tuple[Kept, KroneckerSpectrum]:
    w, v = spectra(Q)[names[0]], spectra(P)[names[1]]
    traces = w.sum(-1), v.sum(-1)
    A, G = (found(values, basis, continued=continued) for values, basis in zip((w, v), BASES, strict=True))
    kept = keep_enough(A, G, traces=traces, damping_rule=rule, damping=damping, direction_error=error)
    made = KroneckerSpectrum.of(kept.A, kept.G, trace_A=traces[0], trace_G=traces[1], damping_rule=rule)
    return kept, made


def components(
    made: KroneckerSpectrum, names: tuple[str, str], rule: DampingRule, damping: float
) -> tuple[Tensor, Tensor]:
    """Returns the components of V's direction along the eigenvectors of both whole factors: as made, and exact."""
    w, v = spectra(Q)[names[0]], spectra(P)[names[1]]
    if rule == "common":
        divisor = v.unsqueeze(-1) * w.unsqueeze(-2) + damping
    else:
        if rule == "pi":
            gamma_A, gamma_G = split_by_trace(w.sum(-1), v.sum(-1), d_in=Q, d_out=P, damping=damping)
        else:
            gamma_A, gamma_G = split_by_largest(w[..., 0], v[..., 0], damping=damping)
        divisor = (v + gamma_G.unsqueeze(-1)).unsqueeze(-1) * (w + gamma_A.unsqueeze(-1)).unsqueeze(-2)
    U, W = BASES
    return W.mT @ made.apply(V, damping) @ U, (W.mT @ V @ U) / divisor


def largest_change(made: KroneckerSpectrum, names: tuple[str, str], rule: DampingRule, damping: float) -> float:
    found, exact = components(made, names, rule, damping)
    rounding = 1e-9 * exact.abs().amax()
    return float((((found - exact).abs() - rounding) / exact.abs()).max())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("continued", [False, True])
def test_every_component_stays_within_the_bound(rule: DampingRule, continued: bool) -> None:
    cuts = 0
    for names, damping in itertools.product(PAIRS, (1e-4, 1.0)):
        kept, made = kept_of(names, rule, damping, continued=continued)
        assert largest_change(made, names, rule, damping) <= kept.error, (names, damping)
        if kept.least_damping and kept.error <= ERROR:
            cuts += 1
            assert largest_change(made, names, rule, kept.least_damping) <= ERROR, (names, damping)
            assert largest_change(made, names, rule, 100 * damping) <= ERROR, (names, damping)
    assert cuts > 10


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("error", [ERROR, 0.0], ids=["cut", "all found"])
def test_the_mean_error_is_that_of_the_components_outside_both_bases(rule: DampingRule, error: float) -> None:
    """Of the worst group; known without the eigenvalues that were never found. Of a whole basis, the leading one."""
    names = ("slow", "fast")
    kept, made = kept_of(names, rule, 1e-2, error=error)
    found, exact = components(made, names, rule, 1e-2)
    outside = [slice(each.values.shape[-1], None) for each in (kept.G, kept.A)]
    complete = [slice(1) if each.complete else rest for each, rest in zip((kept.G, kept.A), outside, strict=True)]
    change = (found / exact - 1)[:, complete[0], complete[1]]
    assert kept.mean_error == pytest.approx(float(change.mean((1, 2)).abs().max()), rel=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_a_bounded_component_is_a_bounded_direction(rule: DampingRule) -> None:
    """In the Euclidean norm, and in that of the damped block, which weighs the components."""
    names = ("fast", "slow")
    kept, made = kept_of(names, rule, 1e-2)
    found, exact = components(made, names, rule, 1e-2)
    U, W = BASES
    eigenvalues = (W.mT @ V @ U) / exact
    for weight in (torch.ones_like(exact), eigenvalues):
        sizes = [torch.linalg.matrix_norm(weight.sqrt() * each) for each in (found - exact, exact)]
        assert bool((sizes[0] <= kept.error * sizes[1]).all())


def test_what_is_needed_is_kept_in_multiples_and_no_more() -> None:
    names = ("few", "few")  # 40 eigenvalues count
    kept, _ = kept_of(names, "pi", 1e-2)
    assert kept.A.values.shape[-1] == kept.G.values.shape[-1] == 2 * MULTIPLE
    assert kept.least_damping == 1e-2 / MARGIN and kept.error < 1e-6
    # So much damping that nothing counts still leaves one multiple.
    kept, _ = kept_of(names, "pi", 1e6)
    assert kept.A.values.shape[-1] == kept.G.values.shape[-1] == MULTIPLE


@pytest.mark.parametrize("rule", RULES)
def test_more_damping_needs_no_more_pairs(rule: DampingRule) -> None:
    names = ("slow", "fast")
    kept = [kept_of(names, rule, 10.0**power)[0] for power in range(-6, 3)]
    ranks = [each.A.values.shape[-1] + each.G.values.shape[-1] for each in kept]
    assert ranks == sorted(ranks, reverse=True) and ranks[0] > ranks[-1]


@pytest.mark.parametrize("rule", RULES)
def test_where_the_rank_is_the_limit_the_bound_says_so(rule: DampingRule) -> None:
    names = ("flat", "few")
    kept, _ = kept_of(names, rule, 1e-4)
    assert kept.A.values.shape[-1] == RANK and kept.error > ERROR
    assert bool((kept.A.tail == 0).all())
    assert kept.G.values.shape[-1] < P  # the other factor's share is small all the same


@pytest.mark.parametrize("rule", RULES)
def test_zero_keeps_all_pairs(rule: DampingRule) -> None:
    names = ("few", "few")
    kept, _ = kept_of(names, rule, 1.0, error=0.0)
    assert kept.A.values.shape[-1] == RANK and kept.G.values.shape[-1] == P
    assert kept.least_damping == 0.0

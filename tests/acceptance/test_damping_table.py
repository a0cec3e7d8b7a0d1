"""`damping` is the lambda of F + lambda I for every method: lambda times the direction tends to V as lambda grows.

How fast follows from the form of the damping, and it is the same for all methods of one form:

- joint damping, (F + lambda I)^{-1} V = V/lambda - F V/lambda^2 + ...: the error is F V/lambda, with the method's
  own F (A (x) G, its rank-one part, the examples' Fisher matrix, or EKFAC's measured one);
- factored Tikhonov damping, gamma = sqrt(lambda) shared out by pi: (G + gamma/pi I)^{-1} V (A + pi gamma I)^{-1} has
  the error (pi G V + V A/pi)/sqrt(lambda). It inverts A (x) G + lambda I plus the two terms pi gamma (I (x) G) and
  (gamma/pi) (A (x) I), which grow with sqrt(lambda) themselves (algorithms.md 1.1): no split of lambda avoids that.

So both forms have the same limit, and each of them one rate: the column below.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from kfdist.curvature.inverters import make_inverter
from kfdist.curvature.inverters.ekfac import EkfacBasis
from kfdist.curvature.references import damping_shares, weighted_fisher
from kfdist.curvature.statistics import MeanVectors
from kfdist.linalg.psd import trace
from tests.acceptance.problems import Problem, wide
from tests.acceptance.ways import Directions, applied, calibrated, inverted
from tests.support.captured_methods import CAPTURED
from tests.support.matrices import relative_error

FirstOrder = Callable[[Problem], Directions]
"""What the error of lambda times the direction is at large lambda, times lambda^rate."""

JOINT, FACTORED = 1.0, 0.5
"""Rates: the error goes down as lambda to minus this power."""


def product(problem: Problem) -> Directions:
    """F V for F = A (x) G."""
    return {name: problem.factors[name].G @ V @ problem.factors[name].A for name, V in problem.gradients.items()}


def fisher(problem: Problem) -> Directions:
    """F V for the Fisher matrix of the samples."""
    return {
        name: (weighted_fisher(problem.samples[name]) @ V.flatten(1).unsqueeze(-1)).view_as(V)
        for name, V in problem.gradients.items()
    }


def sample_product(problem: Problem) -> Directions:
    """F V for A (x) G of the samples: of the last batch alone."""
    found = {}
    for name, V in problem.gradients.items():
        samples = problem.samples[name]
        a, g, n = samples.a.flatten(1, 2), samples.g.flatten(1, 2), len(samples.weight)
        found[name] = (g.mT @ g) @ V @ (a.mT @ a) / (n * samples.positions.sum())
    return found


def means(problem: Problem) -> Directions:
    """F V for the rank-one block of the mean vectors."""
    vectors: Mapping[str, MeanVectors] = problem.statistics[MeanVectors]
    found = {}
    for name, V in problem.gradients.items():
        a, g = vectors[name].a.unsqueeze(-2), vectors[name].g.unsqueeze(-1)
        found[name] = g @ (g.mT @ V @ a.mT) @ a
    return found


def measured(problem: Problem) -> Directions:
    """F V for EKFAC's measured scales in its basis."""
    found = {}
    for name, basis in inverted(make_inverter("ekfac"), problem).items():
        assert isinstance(basis, EkfacBasis)
        memory = basis.calibration_sums(problem.samples[name])
        rotated = basis.Q_G.mT @ problem.gradients[name] @ basis.Q_A
        found[name] = basis.Q_G @ (memory["scales"] / memory["examples"] * rotated) @ basis.Q_A.mT
    return found


def mean_eigenvalue(problem: Problem) -> Directions:
    """tau V, tau = tr(A) tr(G)/(p q)."""
    found = {}
    for name, V in problem.gradients.items():
        A, G = problem.factors[name].A, problem.factors[name].G
        found[name] = trace(A)[:, None, None] * trace(G)[:, None, None] / V[0].numel() * V
    return found


def between(problem: Problem) -> Directions:
    """pi G V + V A/pi."""
    found = {}
    for name, V in problem.gradients.items():
        A, G = problem.factors[name].A, problem.factors[name].G
        pi, per_pi = damping_shares(A, G, rule="pi", damping=1.0)
        found[name] = pi[:, None, None] * G @ V + per_pi[:, None, None] * V @ A
    return found


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method.

    Attributes:
        method: Key of `INVERTERS`.
        rate: The power of 1/lambda by which the error goes down.
        error: Its first term times lambda^rate; None where the method cuts the spectrum, so that only the rate is told.
        why: What makes the rate.
        settings: Of the inverter.
    """

    method: str
    rate: float
    error: FirstOrder | None
    why: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        power = "1/lambda" if self.rate == JOINT else "1/sqrt(lambda)"
        return "-".join([self.method, *(f"{k}={v}" for k, v in self.settings.items()), power])


COMMON = {"damping_rule": "common"}
CUT = {"rank": 6}

TABLE = [
    Row(method="kfac", rate=FACTORED, error=between, why="inverses of damped factors have no joint form"),
    Row(method="kfac-eigen", rate=JOINT, error=product, why="damps products of eigenvalues"),
    Row(method="kfac-eigen", rate=FACTORED, error=between, why="as kfac", settings={"damping_rule": "pi"}),
    Row(
        method="kfac-tridiagonal",
        rate=FACTORED,
        error=between,
        why="as kfac; what neighbours add, Psi_A (x) Psi_G, goes down as 1/lambda",
    ),
    Row(method="ekfac", rate=JOINT, error=measured, why="damps the measured scales"),
    Row(method="ekfac-adam", rate=JOINT, error=mean_eigenvalue, why="before its first step, as V/(lambda + tau)"),
    Row(method="rs-kfac", rate=FACTORED, error=between, why="pi by default, as kfac"),
    Row(method="rs-kfac", rate=JOINT, error=product, why="damps products of eigenvalues", settings=COMMON),
    Row(method="rs-kfac", rate=FACTORED, error=None, why="also truncated", settings=CUT),
    Row(method="rs-kfac", rate=JOINT, error=None, why="also truncated", settings={**CUT, **COMMON}),
    Row(method="sre-kfac", rate=FACTORED, error=between, why="pi by default, as kfac"),
    Row(method="sre-kfac", rate=JOINT, error=product, why="damps products of eigenvalues", settings=COMMON),
    Row(method="b-kfac", rate=FACTORED, error=between, why="pi by default, as kfac", settings={"rank": 16}),
    Row(method="b-kfac", rate=JOINT, error=product, why="joint", settings={"rank": 16, **COMMON}),
    Row(method="b-kfac", rate=FACTORED, error=None, why="also truncated", settings=CUT),
    Row(method="b-r-kfac", rate=FACTORED, error=between, why="pi by default, as kfac", settings={"rank": 16}),
    Row(method="b-r-kfac", rate=JOINT, error=product, why="joint", settings={"rank": 16, **COMMON}),
    Row(method="b-kfac-c", rate=FACTORED, error=between, why="pi by default, as kfac", settings={"rank": 16}),
    Row(method="b-kfac-c", rate=JOINT, error=product, why="joint", settings={"rank": 16, **COMMON}),
    Row(
        method="cg-fac",
        rate=JOINT,
        error=sample_product,
        why="solves for the product plus lambda I",
        settings={"tolerance": 1e-14},
    ),
    Row(
        method="cg-fac",
        rate=JOINT,
        error=fisher,
        why="solves for the Fisher block plus lambda I",
        settings={"tolerance": 1e-14, "operator": "block"},
    ),
    Row(method="seng", rate=JOINT, error=fisher, why="Woodbury's formula for F + lambda I"),
    Row(method="seng", rate=JOINT, error=fisher, why="the same", settings={"form": "implicit"}),
    Row(method="seng", rate=JOINT, error=None, why="a sketch of F", settings={"column_sample_size": 8}),
    Row(method="eva", rate=JOINT, error=means, why="Sherman's and Morrison's formula for F + lambda I"),
    Row(
        method="two-level",
        rate=JOINT,
        error=product,
        why="the inner method's; the difference that coupling makes goes down as 1/lambda^2",
    ),
    Row(
        method="two-level",
        rate=FACTORED,
        error=between,
        why="the inner method's",
        settings={"inner_settings": {"damping_rule": "pi"}},
    ),
]

PRESETS = [
    ("kfac", "damping_rule", "relative"),
    ("kfac-eigen", "damping_rule", "relative"),
    ("rs-kfac", "damping_rule", "relative"),
    ("sre-kfac", "damping_rule", "relative"),
    ("b-kfac", "damping_rule", "relative"),
    ("b-r-kfac", "damping_rule", "relative"),
    ("b-kfac-c", "damping_rule", "relative"),
    ("two-level", "combination", "additive"),
    ("seng", "scaling", "published"),
    ("seng", "aggregate", "local-average"),
]
"""The papers' own rules, by name, for which `damping` means something else or the operator is another one."""


def error_at(row: Row, problem: Problem, damping: float) -> Directions:
    """lambda times the direction, less V, by block."""
    inverter = make_inverter(row.method, **row.settings)
    found = inverted(inverter, problem, damping)
    directions = applied(inverter, found, problem.gradients, damping, calibrated(found, problem))
    return {name: damping * direction - problem.gradients[name] for name, direction in directions.items()}


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.id)
def test_lambda_times_the_direction_tends_to_the_gradient(row: Row) -> None:
    problem = wide()
    # Where the next term is about 1e-3 of the first one, and the rounding of V, 1e-16, is less.
    far = (1e3, 1e5) if row.rate == JOINT else (1e6, 1e9)
    near, farther = (error_at(row, problem, damping) for damping in far)
    for name, V in problem.gradients.items():
        assert float(farther[name].norm() / V.norm()) < 1e-3
        found = torch.log(near[name].norm() / farther[name].norm()) / torch.log(torch.tensor(far[1] / far[0]))
        assert float(found) == pytest.approx(row.rate, abs=0.01), name


@pytest.mark.parametrize("row", [row for row in TABLE if row.error is not None], ids=lambda row: row.id)
def test_methods_of_one_form_have_the_same_error(row: Row) -> None:
    """Not only the rate: the whole first term, so that a lambda means as much in one method as in the other."""
    problem = wide()
    damping = 1e5 if row.rate == JOINT else 1e9
    assert row.error is not None
    expected, found = row.error(problem), error_at(row, problem, damping)
    for name in problem.gradients:
        assert relative_error(-found[name] * damping**row.rate, expected[name]) < 5e-3, name


@pytest.mark.parametrize(("method", "setting", "value"), PRESETS)
def test_the_papers_own_rules_are_presets_by_name(method: str, setting: str, value: str) -> None:
    assert getattr(make_inverter(method), setting) != value
    assert make_inverter(method, **{setting: value}).settings()[setting] == value


@pytest.mark.parametrize("method", [method for method, setting, _ in PRESETS if setting == "damping_rule"])
def test_the_relative_rule_says_which_lambda_it_amounts_to(method: str) -> None:
    """There `damping` is phi; phi^2 w_max(A) w_max(G) times the direction tends to the gradient."""
    problem, phi = wide(), 1e6
    inverter = make_inverter(method, damping_rule="relative")
    if hasattr(inverter, "increment_rows"):
        inverter = make_inverter(method, damping_rule="relative", rank=16)
    found = inverted(inverter, problem, phi)
    directions = applied(inverter, found, problem.gradients, phi)
    for name, V in problem.gradients.items():
        A, G = problem.factors[name].A, problem.factors[name].G
        amounts_to = phi**2 * torch.linalg.eigvalsh(A)[0, -1] * torch.linalg.eigvalsh(G)[0, -1]
        assert float(found[name].joint_damping(phi)) == pytest.approx(float(amounts_to), rel=1e-10)
        assert relative_error(directions[name] * amounts_to, V) < 3 / phi


def test_the_published_combination_of_two_levels_tends_to_something_else() -> None:
    """(I + R^T R) V: each entry of V plus the sum of its block's."""
    problem, damping = wide(), 1e8
    inverter = make_inverter("two-level", combination="additive")
    directions = applied(inverter, inverted(inverter, problem, damping), problem.gradients, damping)
    for name, V in problem.gradients.items():
        assert relative_error(damping * directions[name], V + V.sum()) < 1e-4


def test_every_method_has_its_row() -> None:
    assert {row.method for row in TABLE} == set(CAPTURED)
    assert all(row.why for row in TABLE)

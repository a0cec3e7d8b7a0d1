"""Every equivalence of algorithms.md section 10, case by case, in float64 on real layers.

A case is a problem and several ways to compute the direction of each of its blocks (in number 11: to train its
parameters) that must agree. For example, case 4 says that `b-kfac-c` without corrections is `b-kfac`: both run on the
same four batches, and every block's directions differ by at most 1e-10, relative, Frobenius. No case needs more.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest

from tests.acceptance.problems import (
    ALL,
    Problem,
    cnn,
    convolution,
    one_batch,
    one_example,
    one_layer,
    sequence,
    wide,
)
from tests.acceptance.training_over_ranks import STRATEGIES, single_process, world_of
from tests.acceptance.ways import (
    Way,
    after,
    by,
    compressed,
    dense_factored,
    dense_fisher,
    dense_joint,
    ekfac_with_eigenvalue_products,
    expand_factors,
    rank_one_factors,
)
from tests.support.captured_methods import CAPTURED
from tests.support.matrices import relative_error

EXACT = 1e-10

CG = {"tolerance": 1e-14, "max_iterations": 500}
"""Converged conjugate gradients: condition numbers below 1e3 leave errors of at most 1e-11."""


def every_pair(method: str, **settings: Any) -> Way:
    """A sketched method that cuts no eigenpair off, neither by its rank nor by the bound on its directions."""
    return by(method, rank=ALL, direction_error=None, **settings)


def as_sequence(kernel: int, size: int) -> Callable[[Problem], Problem]:
    """Replaces a convolution's problem by that of the Linear layer over its patches."""
    return lambda _: sequence(kernel, size)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One equivalence.

    Attributes:
        number: Of the section's sentence, with a letter where it holds several.
        says: The equivalence.
        problem: Makes what the ways are given.
        ways: All of them; each is compared with the first.
    """

    number: str
    says: str
    problem: Callable[[], Problem] = wide
    ways: Sequence[Way]

    @property
    def id(self) -> str:
        return f"{self.number} {self.says}"


CASES = [
    Case(
        number="1",
        says="rs-kfac(r=d) = sre-kfac(r=d) = kfac(factor-wise lambda_A, lambda_G by pi) = dense",
        problem=cnn,
        ways=[dense_factored("pi"), every_pair("rs-kfac"), every_pair("sre-kfac"), by("kfac")],
    ),
    Case(
        number="1a",
        says="the same with lambda_A, lambda_G relative to the largest eigenvalues",
        problem=cnn,
        ways=[
            dense_factored("relative"),
            every_pair("rs-kfac", damping_rule="relative"),
            every_pair("sre-kfac", damping_rule="relative"),
            by("kfac", damping_rule="relative"),
        ],
    ),
    Case(
        number="2",
        says="b-kfac(no truncation) = rs-kfac(r=d) on the same average from zero",
        ways=[every_pair("rs-kfac"), by("b-kfac", rank=16, direction_error=None)],
    ),
    Case(
        number="3",
        says="b-r-kfac(T_R=T_B) = rs-kfac",
        ways=[by("rs-kfac", rank=6, oversampling=2), by("b-r-kfac", rank=6, oversampling=2)],
    ),
    Case(
        number="4",
        says="b-kfac-c(phi_c=0) = b-kfac",
        ways=[by("b-kfac", rank=6), by("b-kfac-c", rank=6, correction_fraction=0.0)],
    ),
    Case(
        number="5",
        says="cg-fac(kronecker, converged) = kfac(joint damping, rho=0, empirical g) = dense",
        problem=one_batch,
        ways=[dense_joint, by("kfac-eigen"), by("cg-fac", **CG), by("cg-fac", jacobi=True, **CG)],
    ),
    Case(
        number="6",
        says="cg-fac(block, converged) = seng(explicit, no sketch) = dense",
        problem=one_batch,
        ways=[dense_fisher, by("seng", form="explicit"), by("cg-fac", operator="block", **CG)],
    ),
    Case(
        number="6a",
        says="on one example, where F = A (x) G, they equal cg-fac(kronecker) and kfac(joint damping) too",
        problem=one_example,
        ways=[
            dense_fisher,
            by("seng", form="explicit"),
            by("seng", form="implicit"),
            by("cg-fac", operator="block", **CG),
            by("cg-fac", **CG),
            by("kfac-eigen"),
        ],
    ),
    Case(
        number="7",
        says="seng(implicit, kappa>=T, exact back-projection) = seng(explicit)",
        problem=one_batch,
        ways=[
            by("seng", form="explicit"),
            after(compressed(None), by("seng", form="implicit")),
            # No example's gradient has a rank above 12 here, so 12 columns hold it as well as 36 positions do.
            after(compressed(12), by("seng", form="implicit")),
        ],
    ),
    Case(
        number="8",
        says="eva = kfac(joint damping) with rank-one factors = dense",
        problem=cnn,
        ways=[
            by("eva"),
            after(rank_one_factors, by("kfac-eigen")),
            after(rank_one_factors, by("rs-kfac", rank=1, damping_rule="common")),
            after(rank_one_factors, dense_joint),
        ],
    ),
    Case(
        number="9",
        says="ekfac(s = d_G d_A^T) = kfac(joint damping)",
        problem=cnn,
        ways=[by("kfac-eigen"), ekfac_with_eigenvalue_products],
    ),
    Case(
        number="9a",
        says="ekfac(measured s) on one example, where F = A (x) G, = kfac(joint damping) = dense",
        problem=one_example,
        ways=[dense_fisher, by("kfac-eigen"), by("ekfac")],
    ),
    *(
        Case(
            number=f"10{letter}",
            says=f"KFC on 1x1 maps = K-FAC, by {method}",
            problem=partial(convolution, 1, 1),
            ways=[by(method), after(as_sequence(1, 1), by(method))],
        )
        for letter, method in zip("abcdef", ("kfac", "kfac-eigen", "ekfac", "eva", "seng", "cg-fac"), strict=True)
    ),
    *(
        Case(
            number=f"10{letter}",
            says=f"KFC({kernel}x{kernel} kernel) = expand K-FAC(R = T = 9 patches) = Omega/T (x) T Gamma = dense",
            problem=partial(convolution, kernel, 3),
            ways=[
                dense_joint,
                by("kfac-eigen"),
                after(as_sequence(kernel, 3), by("kfac-eigen")),
                after(expand_factors, by("kfac-eigen")),
            ],
        )
        for letter, kernel in zip("gh", (1, 3), strict=True)
    ),
    Case(
        number="10i",
        says="the constants T and 1/T of expand K-FAC change nothing under pi",
        problem=partial(convolution, 3, 3),
        ways=[by("kfac"), after(expand_factors, by("kfac")), after(expand_factors, dense_factored("pi"))],
    ),
    Case(
        number="10j",
        says="nor relative to the largest eigenvalues",
        problem=partial(convolution, 3, 3),
        ways=[by("kfac", damping_rule="relative"), after(expand_factors, by("kfac", damping_rule="relative"))],
    ),
    *(
        Case(
            number="11",
            says=f"2 ranks with identical data = world of 1 = single process: {strategy}",
            ways=[
                single_process(strategy),
                world_of(1, strategy),
                world_of(2, strategy),
                world_of(2, strategy, rank=1),
            ],
        )
        for strategy in STRATEGIES
    ),
    Case(
        number="12",
        says="two-level(omega_2=0) = block-diagonal",
        ways=[by("kfac-eigen"), by("two-level", omega_coarse=0.0)],
    ),
    Case(
        number="12a",
        says="two-level(omega_2=0) = block-diagonal, factored damping",
        ways=[by("kfac"), by("two-level", omega_coarse=0.0, inner_settings={"damping_rule": "pi"})],
    ),
    Case(
        number="12b",
        says="kfac-tridiagonal(L=1) = block-diagonal",
        problem=one_layer,
        ways=[by("kfac"), by("kfac-tridiagonal"), dense_factored("pi")],
    ),
    Case(
        number="12c",
        says="two-level(L=1), which adds what coupling changes, = block-diagonal",
        problem=one_layer,
        ways=[by("kfac-eigen"), by("two-level"), dense_joint],
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_equivalence(case: Case) -> None:
    problem = case.problem()
    first, *others = [way(problem) for way in case.ways]
    assert others
    for place, other in enumerate(others, start=2):
        assert other.keys() == first.keys()
        for name, expected in first.items():
            error = relative_error(other[name], expected)
            assert error <= EXACT, f"way {place} is {error:.1e} off in {name!r}"


def test_the_table_has_every_number_of_the_section_and_every_method() -> None:
    assert {int("".join(filter(str.isdigit, case.number))) for case in CASES} == set(range(1, 13))
    assert len({case.id for case in CASES}) == len(CASES)
    assert {method for method, _ in STRATEGIES.values()} == set(CAPTURED)


def test_ways_that_differ_are_told_apart() -> None:
    """What the cases compare is not the same whatever the method."""
    problem = wide()
    ways = [by("kfac"), by("kfac-eigen"), by("rs-kfac", rank=3), by("eva"), by("seng"), by("two-level")]
    ways += [by("kfac-tridiagonal"), by("cg-fac"), by("b-kfac", rank=6), by("b-kfac-c", rank=6)]
    found = [way(problem)["2"] for way in ways]
    for place, one in enumerate(found):
        assert all(relative_error(other, one) > 1e4 * EXACT for other in found[place + 1 :])

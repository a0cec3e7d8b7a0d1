"""The acceptance matrix: every equivalence of algorithms.md section 10, row by row, in float64 on real layers.

All sides of a row give the same directions (in row 11: the same trained parameters), block by block, up to a relative
error of 1e-10, Frobenius; no row needs more.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import pytest

from kfdist.curvature.inverters import INVERTERS
from tests.acceptance.scenes import cnn, convolution, one_batch, one_example, one_layer, sequence, wide
from tests.acceptance.sides import (
    ALL,
    Scene,
    Side,
    by,
    compressed,
    dense_factored,
    dense_fisher,
    dense_joint,
    ekfac_with_eigenvalue_products,
    expand_factors,
    on,
    rank_one_factors,
)
from tests.acceptance.worlds import STRATEGIES, single_process, world_of
from tests.support.matrices import relative_error

EXACT = 1e-10

CG = {"tolerance": 1e-14, "max_iterations": 500}
"""Converged conjugate gradients: condition numbers below 1e3 leave errors of at most 1e-11."""


def as_sequence(kernel: int, size: int) -> Callable[[Scene], Scene]:
    """Replaces a convolution's scene by that of the Linear layer over its patches."""
    return lambda _: sequence(kernel, size)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the matrix, with a letter where the section's sentence holds several.

    Attributes:
        number: As in the section.
        says: The equivalence.
        on: What the sides are computed on.
        sides: All of them; each is compared with the first.
    """

    number: str
    says: str
    on: Callable[[], Scene] = wide
    sides: Sequence[Side]

    @property
    def id(self) -> str:
        return f"{self.number} {self.says}"


TABLE = [
    Row(
        number="1",
        says="rs-kfac(r=d) = sre-kfac(r=d) = kfac(factor-wise lambda_A, lambda_G by pi) = dense",
        on=cnn,
        sides=[dense_factored("pi"), by("rs-kfac", rank=ALL), by("sre-kfac", rank=ALL), by("kfac")],
    ),
    Row(
        number="1a",
        says="the same with lambda_A, lambda_G relative to the largest eigenvalues",
        on=cnn,
        sides=[
            dense_factored("relative"),
            by("rs-kfac", rank=ALL, damping_rule="relative"),
            by("sre-kfac", rank=ALL, damping_rule="relative"),
            by("kfac", damping_rule="relative"),
        ],
    ),
    Row(
        number="2",
        says="b-kfac(no truncation) = rs-kfac(r=d) on the same average from zero",
        sides=[by("rs-kfac", rank=ALL), by("b-kfac", rank=16)],
    ),
    Row(
        number="3",
        says="b-r-kfac(T_R=T_B) = rs-kfac",
        sides=[by("rs-kfac", rank=6, oversampling=2), by("b-r-kfac", rank=6, oversampling=2)],
    ),
    Row(
        number="4",
        says="b-kfac-c(phi_c=0) = b-kfac",
        sides=[by("b-kfac", rank=6), by("b-kfac-c", rank=6, correction_fraction=0.0)],
    ),
    Row(
        number="5",
        says="cg-fac(kronecker, converged) = kfac(joint damping, rho=0, empirical g) = dense",
        on=one_batch,
        sides=[dense_joint, by("kfac-eigen"), by("cg-fac", **CG), by("cg-fac", jacobi=True, **CG)],
    ),
    Row(
        number="6",
        says="cg-fac(block, converged) = seng(explicit, no sketch) = dense",
        on=one_batch,
        sides=[dense_fisher, by("seng", form="explicit"), by("cg-fac", operator="block", **CG)],
    ),
    Row(
        number="6a",
        says="on one example, where F = A (x) G, they equal cg-fac(kronecker) and kfac(joint damping) too",
        on=one_example,
        sides=[
            dense_fisher,
            by("seng", form="explicit"),
            by("seng", form="implicit"),
            by("cg-fac", operator="block", **CG),
            by("cg-fac", **CG),
            by("kfac-eigen"),
        ],
    ),
    Row(
        number="7",
        says="seng(implicit, kappa>=T, exact back-projection) = seng(explicit)",
        on=one_batch,
        sides=[
            by("seng", form="explicit"),
            on(compressed(None), by("seng", form="implicit")),
            # No example's gradient has a rank above 12 here, so 12 columns hold it as well as 36 positions do.
            on(compressed(12), by("seng", form="implicit")),
        ],
    ),
    Row(
        number="8",
        says="eva = kfac(joint damping) with rank-one factors = dense",
        on=cnn,
        sides=[
            by("eva"),
            on(rank_one_factors, by("kfac-eigen")),
            on(rank_one_factors, by("rs-kfac", rank=1, damping_rule="common")),
            on(rank_one_factors, dense_joint),
        ],
    ),
    Row(
        number="9",
        says="ekfac(s = d_G d_A^T) = kfac(joint damping)",
        on=cnn,
        sides=[by("kfac-eigen"), ekfac_with_eigenvalue_products],
    ),
    Row(
        number="9a",
        says="ekfac(measured s) on one example, where F = A (x) G, = kfac(joint damping) = dense",
        on=one_example,
        sides=[dense_fisher, by("kfac-eigen"), by("ekfac")],
    ),
    *(
        Row(
            number=f"10{letter}",
            says=f"KFC on 1x1 maps = K-FAC, by {method}",
            on=partial(convolution, 1, 1),
            sides=[by(method), on(as_sequence(1, 1), by(method))],
        )
        for letter, method in zip("abcdef", ("kfac", "kfac-eigen", "ekfac", "eva", "seng", "cg-fac"), strict=True)
    ),
    *(
        Row(
            number=f"10{letter}",
            says=f"KFC({kernel}x{kernel} kernel) = expand K-FAC(R = T = 9 patches) = Omega/T (x) T Gamma = dense",
            on=partial(convolution, kernel, 3),
            sides=[
                dense_joint,
                by("kfac-eigen"),
                on(as_sequence(kernel, 3), by("kfac-eigen")),
                on(expand_factors, by("kfac-eigen")),
            ],
        )
        for letter, kernel in zip("gh", (1, 3), strict=True)
    ),
    Row(
        number="10i",
        says="the constants T and 1/T of expand K-FAC change nothing under pi",
        on=partial(convolution, 3, 3),
        sides=[by("kfac"), on(expand_factors, by("kfac")), on(expand_factors, dense_factored("pi"))],
    ),
    Row(
        number="10j",
        says="nor relative to the largest eigenvalues",
        on=partial(convolution, 3, 3),
        sides=[by("kfac", damping_rule="relative"), on(expand_factors, by("kfac", damping_rule="relative"))],
    ),
    *(
        Row(
            number="11",
            says=f"2 ranks with identical data = world of 1 = single process: {strategy}",
            sides=[
                single_process(strategy),
                world_of(1, strategy),
                world_of(2, strategy),
                world_of(2, strategy, rank=1),
            ],
        )
        for strategy in STRATEGIES
    ),
    Row(
        number="12",
        says="two-level(omega_2=0) = block-diagonal",
        sides=[by("kfac-eigen"), by("two-level", omega_coarse=0.0)],
    ),
    Row(
        number="12a",
        says="two-level(omega_2=0) = block-diagonal, factored damping",
        sides=[by("kfac"), by("two-level", omega_coarse=0.0, inner_settings={"damping_rule": "pi"})],
    ),
    Row(
        number="12b",
        says="kfac-tridiagonal(L=1) = block-diagonal",
        on=one_layer,
        sides=[by("kfac"), by("kfac-tridiagonal"), dense_factored("pi")],
    ),
    Row(
        number="12c",
        says="two-level(L=1), which adds what coupling changes, = block-diagonal",
        on=one_layer,
        sides=[by("kfac-eigen"), by("two-level"), dense_joint],
    ),
]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.id)
def test_equivalence(row: Row) -> None:
    scene = row.on()
    first, *others = [side(scene) for side in row.sides]
    assert others
    for place, other in enumerate(others, start=2):
        assert other.keys() == first.keys()
        for name, expected in first.items():
            error = relative_error(other[name], expected)
            assert error <= EXACT, f"side {place} is {error:.1e} off in {name!r}"


def test_the_table_has_every_number_of_the_section_and_every_method() -> None:
    assert {int("".join(filter(str.isdigit, row.number))) for row in TABLE} == set(range(1, 13))
    assert len({row.id for row in TABLE}) == len(TABLE)
    assert {method for method, _ in STRATEGIES.values()} == set(INVERTERS)


def test_sides_that_differ_are_told_apart() -> None:
    """What the rows compare is not the same whatever the method."""
    scene = wide()
    sides = [by("kfac"), by("kfac-eigen"), by("rs-kfac", rank=3), by("eva"), by("seng"), by("two-level")]
    sides += [by("kfac-tridiagonal"), by("cg-fac"), by("b-kfac", rank=6), by("b-kfac-c", rank=6)]
    found = [side(scene)["2"] for side in sides]
    for place, one in enumerate(found):
        assert all(relative_error(other, one) > 1e4 * EXACT for other in found[place + 1 :])

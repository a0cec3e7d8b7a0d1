"""The KL clip: nu = min(1, sqrt(kappa / sum_l lr_l^2 <U_l, V_l>)) (algorithms.md 1.4, check K7)."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kfdist.comm.communicator import Communicator
from kfdist.curvature.block_memory import BlockMemory
from kfdist.curvature.blocks import Block
from kfdist.curvature.inverse import KroneckerInverse
from kfdist.curvature.references import dense_kronecker
from kfdist.runtime.apply.directions import Application, precondition_gradients
from tests.support.factors import blocks_of
from tests.support.preconditioning import two_layers

EXACT = 1e-12
"""float64: a dozen operations on matrices of at most 30 numbers."""


ALONE = Communicator(None)


def spd(size: int, seed: int) -> Tensor:
    matrix = torch.randn(1, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return matrix @ matrix.mT + 0.1 * torch.eye(size, dtype=torch.float64)


def inverse(block: Block, sign: float = 1.0, seed: int = 0) -> KroneckerInverse:
    ones = torch.ones(1, dtype=torch.float64)
    return KroneckerInverse(
        trace_A=ones,
        trace_G=ones,
        A_inverse=spd(block.shape.d_in, seed),
        G_inverse=sign * spd(block.shape.d_out, seed + 1),
        damping_A=ones,
        damping_G=ones,
    )


def with_gradients(size: float = 1.0) -> tuple[nn.Module, list[Block], list[Tensor]]:
    model = two_layers()
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.grad = size * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    blocks = list(blocks_of(model).values())
    return model, blocks, [block.gradient() for block in blocks]


def apply(
    blocks: list[Block], *, kl_clip: float | None, rates: dict[int, float], sign: float = 1.0, fallback: bool = False
) -> list[Tensor]:
    """The directions as written into `.grad`."""
    applications = [
        Application(
            blocks=[block],
            preconditioners=[inverse(block, sign)],
            memories=[BlockMemory()],
            damping=0.1,
            fallback=fallback,
        )
        for block in blocks
    ]
    precondition_gradients(applications, kl_clip=kl_clip, learning_rate=lambda p: rates[id(p)], communicator=ALONE)
    return [block.gradient() for block in blocks]


def rates_of(blocks: list[Block], *rates: float) -> dict[int, float]:
    return {id(p): lr for block, lr in zip(blocks, rates, strict=True) for p in block.parameters()}


def divergence(blocks: list[Block], directions: list[Tensor], rates: tuple[float, ...]) -> float:
    """sum_l lr_l^2 vec(U_l)^T F_l vec(U_l) with the dense F_l whose inverse was applied: the KL the clip bounds."""
    total = 0.0
    for block, U, lr in zip(blocks, directions, rates, strict=True):
        made = inverse(block)
        F = torch.linalg.inv(dense_kronecker(made.A_inverse, made.G_inverse))
        u = U.flatten(1).unsqueeze(-1)
        total += lr**2 * float(u.mT @ F @ u)
    return total


@settings(max_examples=40, deadline=None)
@given(
    st.floats(1e-8, 1e4),
    st.tuples(st.floats(1e-4, 10.0), st.floats(1e-4, 10.0)),
    st.floats(1e-6, 1e3),
)
def test_an_active_clip_attains_kappa_exactly_and_an_idle_one_changes_nothing(
    kappa: float, rates: tuple[float, float], size: float
):
    _, blocks, _ = with_gradients(size)
    plain = apply(blocks, kl_clip=None, rates=rates_of(blocks, *rates))
    _, blocks, _ = with_gradients(size)
    clipped = apply(blocks, kl_clip=kappa, rates=rates_of(blocks, *rates))
    unclipped = divergence(blocks, plain, rates)
    if unclipped > kappa * (1 + EXACT):
        assert divergence(blocks, clipped, rates) == pytest.approx(kappa, rel=1e-9)  # dense inverses of condition 1e3
    elif unclipped < kappa * (1 - EXACT):
        assert all(torch.equal(a, b) for a, b in zip(clipped, plain, strict=True))
    for mine, theirs in zip(clipped, plain, strict=True):
        assert mine.norm() <= theirs.norm() * (1 + EXACT), "never amplifies"


def test_nu_is_one_number_for_all_blocks():
    _, blocks, V = with_gradients()
    plain = apply(blocks, kl_clip=None, rates={})
    total = sum(lr**2 * float((U * v).sum()) for lr, U, v in zip((0.1, 0.7), plain, V, strict=True))
    _, blocks, _ = with_gradients()
    clipped = apply(blocks, kl_clip=1e-4, rates=rates_of(blocks, 0.1, 0.7))
    for mine, theirs in zip(clipped, plain, strict=True):
        torch.testing.assert_close(mine, math.sqrt(1e-4 / total) * theirs, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("kappa", [1e-3, 1e30])
def test_a_negative_sum_clips_nothing(kappa: float):
    """<U, V> can only be negative for an indefinite preconditioner; scaling by sqrt of it would make NaN."""
    _, blocks, _ = with_gradients()
    plain = apply(blocks, kl_clip=None, rates={}, sign=-1.0)
    _, blocks, _ = with_gradients()
    clipped = apply(blocks, kl_clip=kappa, rates=rates_of(blocks, 1.0, 1.0), sign=-1.0)
    assert all(torch.equal(a, b) for a, b in zip(clipped, plain, strict=True))


@pytest.mark.parametrize(("size", "lr"), [(0.0, 1.0), (1.0, 0.0)], ids=["zero gradients", "zero learning rate"])
def test_a_sum_of_zero_clips_nothing(size: float, lr: float):
    _, blocks, _ = with_gradients(size)
    plain = apply(blocks, kl_clip=None, rates={})
    _, blocks, _ = with_gradients(size)
    clipped = apply(blocks, kl_clip=1e-3, rates=rates_of(blocks, lr, lr))
    assert all(torch.equal(a, b) for a, b in zip(clipped, plain, strict=True))


def test_float32_gradients_are_clipped_in_float32():
    model, _, _ = with_gradients()
    model.float()
    blocks = list(blocks_of(model).values())
    plain = apply(blocks, kl_clip=None, rates={})
    clipped = apply(blocks, kl_clip=1e-9, rates=rates_of(blocks, 1.0, 1.0))
    assert all(each.dtype == torch.float32 for each in clipped)
    assert all(float(a.norm()) < float(b.norm()) for a, b in zip(clipped, plain, strict=True))


def test_the_fallback_scales_every_gradient_by_its_blocks_mean_curvature():
    """V / (lambda + tau), tau = tr(A) tr(G) / (p q); the inverse's own damping is 1 here, so lambda is 1."""
    _, blocks, V = with_gradients()
    scaled = apply(blocks, kl_clip=None, rates={}, fallback=True)
    for block, mine, gradient in zip(blocks, scaled, V, strict=True):
        tau = 1.0 / (block.shape.d_in * block.shape.d_out)
        torch.testing.assert_close(mine, gradient / (1.0 + tau), rtol=EXACT, atol=EXACT)


def test_nothing_to_apply_is_fine():
    precondition_gradients([], kl_clip=1e-3, learning_rate=lambda p: 1.0, communicator=ALONE)


def test_a_block_adds_no_more_to_the_divergence_than_at_the_first_step_of_its_inverse():
    """nu_l = min(1, sqrt(max(1, r_l) / <U_l, V_l>)), each block for itself; a newer inverse starts anew."""
    model, blocks, V = with_gradients(size=10.0)
    memories = [BlockMemory() for _ in blocks]
    applications = [
        Application(blocks=[block], preconditioners=[inverse(block)], memories=[memory], damping=0.1, fallback=False)
        for block, memory in zip(blocks, memories, strict=True)
    ]

    def added(*sizes: float) -> list[float]:
        """<U_l, V_l> nu_l^2 of gradients that are so many times the first ones; lr is small: the global clip idles."""
        for block, v, size in zip(blocks, V, sizes, strict=True):
            block.write_gradient(size * v)
        precondition_gradients(applications, kl_clip=1.0, learning_rate=lambda p: 1e-6, communicator=ALONE)
        squares = []
        for block, v, size in zip(blocks, V, sizes, strict=True):
            scaled, plain = block.gradient(), inverse(block).apply(size * v, 0.1, BlockMemory())
            nu = scaled.norm() / plain.norm()
            torch.testing.assert_close(scaled, nu * plain, rtol=EXACT, atol=EXACT)
            squares.append(float(nu**2 * (plain * size * v).sum()))
        return squares

    first = added(1.0, 1.0)
    assert first == pytest.approx([float(torch.as_tensor(memory.first_use)) for memory in memories]) and min(first) > 1
    assert added(0.5, 3.0) == pytest.approx([first[0] / 4, first[1]])
    assert added(30.0, 1.0) == pytest.approx(first)
    for memory in memories:
        memory.first_use = None
    assert added(3.0, 1e-3) == pytest.approx([9 * first[0], 1e-6 * first[1]])
    assert added(1.0, 1e3) == pytest.approx([first[0], 1.0]), "1 is what no fresh inverse exceeds"


def test_a_gradient_that_overflowed_is_not_the_one_that_later_ones_are_compared_to():
    """A GradScaler skips its step; the one after it is scaled as if that one had not been."""
    _, blocks, V = with_gradients(size=10.0)
    memories = [BlockMemory() for _ in blocks]
    applications = [
        Application(blocks=[block], preconditioners=[inverse(block)], memories=[memory], damping=0.1, fallback=False)
        for block, memory in zip(blocks, memories, strict=True)
    ]
    fresh = apply(blocks, kl_clip=1.0, rates=rates_of(blocks, 1e-6, 1e-6))
    for size in (float("inf"), 1.0):
        for block, v in zip(blocks, V, strict=True):
            block.write_gradient(size * v)
        precondition_gradients(applications, kl_clip=1.0, learning_rate=lambda p: 1e-6, communicator=ALONE)
    assert all(torch.equal(block.gradient(), each) for block, each in zip(blocks, fresh, strict=True))


def test_without_a_kl_clip_nothing_is_compared():
    _, blocks, _ = with_gradients()
    memory = BlockMemory()
    application = Application(
        blocks=blocks[:1], preconditioners=[inverse(blocks[0])], memories=[memory], damping=0.1, fallback=False
    )
    precondition_gradients([application], kl_clip=None, learning_rate=lambda p: 1.0, communicator=ALONE)
    assert memory.first_use is None

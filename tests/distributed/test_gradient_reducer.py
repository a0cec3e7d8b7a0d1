"""The reducer's mean over ranks, whatever arrives when; its buckets never change."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from kfdist.comm.communicator import Communicator
from kfdist.comm.reduce import GradientReducer
from kfdist.errors import KfdistError
from tests.support.preconditioning import backward, two_layers
from tests.support.ranks import run_ranks

EXACT = 1e-14
"""float64: the mean of two or four numbers near 1, in another order of addition."""


class Branches(nn.Module):
    """Layers that a rank uses or not; one is frozen, one has another dtype, one nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(3, 4).double()
        self.left = nn.Linear(4, 2).double()
        self.right = nn.Linear(4, 2).double()
        self.frozen = nn.Linear(2, 2).double().requires_grad_(False)
        self.single = nn.Linear(2, 2).float()
        self.unused = nn.Linear(2, 2).double()

    def forward(self, x: Tensor, *, left: bool = True) -> Tensor:
        x = torch.tanh(self.stem(x))
        x = self.frozen(self.left(x) if left else self.right(x))
        return self.single(x.float()).double()


def inputs(rank: int, step: int) -> Tensor:
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(100 * step + rank), dtype=torch.float64)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def own_gradients(rank: int, step: int) -> dict[str, Tensor]:
    """Without any communication; even ranks go left."""
    model = Branches()
    model(inputs(rank, step), left=rank % 2 == 0).sum().backward()
    return gradients(model)


def mean_of(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A parameter without a gradient on a rank counts as zero there."""
    parameters = {name: p for name, p in Branches().named_parameters() if p.requires_grad}
    return {
        name: torch.stack([part.get(name, torch.zeros_like(p)) for part in parts]).mean(0)
        for name, p in parameters.items()
    }


def reduce_steps(communicator: Communicator, bucket_bytes: int, overlap: bool) -> list[dict[str, Tensor]]:
    model = Branches()
    reducer = GradientReducer(list(model.parameters()), communicator, bucket_bytes=bucket_bytes)
    if not overlap:
        reducer.no_overlap()
    results = []
    for step in range(3):
        model.zero_grad()
        model(inputs(communicator.rank, step), left=communicator.rank % 2 == 0).sum().backward()
        reducer.reduce()
        results.append(gradients(model))
    reducer.close()
    assert reducer.bytes_per_step == sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return results


@pytest.mark.parametrize("overlap", [True, False], ids=["overlapped", "at the end"])
@pytest.mark.parametrize("bucket_bytes", [1, 100, 1 << 20])
def test_every_gradient_becomes_the_mean_over_ranks(bucket_bytes: int, overlap: bool):
    """Also where a layer is unused on one rank (right, left) or on all (unused); frozen ones stay out."""
    expected = [mean_of([own_gradients(rank, step) for rank in range(2)]) for step in range(3)]
    for of_rank in run_ranks(2, reduce_steps, bucket_bytes, overlap):
        for mine, truth in zip(of_rank, expected, strict=True):
            assert set(mine) == set(truth)
            for name in truth:
                tolerance = EXACT if truth[name].dtype == torch.float64 else 1e-6
                torch.testing.assert_close(mine[name], truth[name], rtol=tolerance, atol=tolerance)


def same_step_twice(communicator: Communicator) -> list[dict[str, Tensor]]:
    """The first step, others, and the first one's gradients again, in a world where the order of sums matters."""
    model = Branches()
    reducer = GradientReducer(list(model.parameters()), communicator, bucket_bytes=64)
    results = []
    for step, left in ((0, True), (1, False), (2, True), (0, True)):
        model.zero_grad()
        model(inputs(communicator.rank, step), left=left).sum().backward()
        reducer.reduce()
        results.append(gradients(model))
    reducer.close()
    return results


def test_four_ranks_sum_in_the_same_order_at_the_first_step_and_later():
    """DDP rebuilds its buckets after the first backward; a resumed run would then differ in its last bits."""
    results = run_ranks(4, same_step_twice)
    first, *_, again = results[0]
    for name in first:
        assert torch.equal(first[name], again[name])
        assert all(torch.equal(of_rank[0][name], first[name]) for of_rank in results)


def accumulate(communicator: Communicator) -> dict[str, Tensor]:
    model = Branches()
    reducer = GradientReducer(list(model.parameters()), communicator, bucket_bytes=64)
    reducer.no_overlap()
    for part in inputs(communicator.rank, 0).split([2, 3]):
        model(part).sum().backward()
    reducer.reduce()
    reducer.close()
    return gradients(model)


def test_accumulated_gradients_are_reduced_once_at_the_end():
    parts = []
    for rank in range(2):
        model = Branches()
        model(inputs(rank, 0)).sum().backward()
        parts.append(gradients(model))
    expected = mean_of(parts)
    for of_rank in run_ranks(2, accumulate):
        for name, truth in expected.items():
            tolerance = EXACT if truth.dtype == torch.float64 else 1e-6
            torch.testing.assert_close(of_rank[name], truth, rtol=tolerance, atol=tolerance)


def accumulate_overlapped(communicator: Communicator) -> str:
    model = two_layers()
    reducer = GradientReducer(list(model.parameters()), communicator, bucket_bytes=64)
    backward(model)
    try:
        backward(model)
    except KfdistError as error:
        reducer.reduce()
        return str(error)
    finally:
        reducer.close()
    return ""


def test_a_second_backward_whose_gradients_would_be_lost_is_an_error():
    for said in run_ranks(2, accumulate_overlapped):
        assert "call no_overlap()" in said


def test_a_single_process_keeps_its_gradients():
    model = Branches()
    reducer = GradientReducer(list(model.parameters()), Communicator(None))
    for _ in range(2):
        model(inputs(0, 0)).sum().backward()
    before = gradients(model)
    reducer.reduce()
    assert set(gradients(model)) == set(before)
    assert all(torch.equal(gradients(model)[name], before[name]) for name in before)
    reducer.close()

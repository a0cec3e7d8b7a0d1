"""A closure that runs several times leaves the traces of one run."""

import pytest
import torch
from torch import Tensor, nn

from kfdist.errors import KfdistError
from kfdist.optim.replay import Replay

CPU = torch.device("cpu")


class Counting(nn.Module):
    """Puts a new tensor in the buffer's place at each forward, instead of changing the one that is there."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return x * self.calls


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), Counting(), nn.Linear(4, 2)).double()


def closure_of(model: nn.Module):
    x = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def closure() -> tuple[Tensor, Tensor]:
        output = model(x)
        return output, output.square().mean()

    return closure


def traces(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()} | {"generator": torch.get_rng_state()}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(first[key], second[key]) for key in first)


def test_later_runs_see_the_first_ones_masks_and_leave_its_traces():
    model = network()
    replay = Replay(closure_of(model), (), model, CPU)
    first = replay.first()
    after_one = traces(model)
    assert int(model[1].num_batches_tracked) == 1
    for _ in range(3):
        again = replay.again()
        assert torch.equal(again.output, first.output)
        assert equal(traces(model), after_one)
    with torch.no_grad():
        assert not replay.again().output.requires_grad


def test_traces_are_put_back_where_a_run_fails():
    model = network()
    fails = False
    inner = closure_of(model)

    def closure() -> tuple[Tensor, Tensor]:
        result = inner()
        if fails:
            raise RuntimeError("a bad day")
        return result

    replay = Replay(closure, (), model, CPU)
    replay.first()
    after_one, fails = traces(model), True
    with pytest.raises(RuntimeError, match="a bad day"):
        replay.again()
    assert equal(traces(model), after_one)


def test_the_training_forward_can_be_undone():
    model = network()
    before = traces(model)
    replay = Replay(closure_of(model), (), model, CPU)
    replay.first()
    assert not equal(traces(model), before)
    replay.undo()
    assert equal(traces(model), before)


def test_the_number_of_examples_is_the_batch_dimension_or_what_the_closure_says():
    model = network()
    output, loss = closure_of(model)()
    assert Replay(lambda: (output, loss), (), model, CPU).first().examples == 6
    stated = Replay(lambda: (output, loss, 11), (), model, CPU).first()
    assert stated.examples == 11 and stated.stated


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (torch.ones(()), "returned Tensor"),
        ((torch.ones(2, 2), torch.ones(2)), "no scalar"),
        ((torch.ones(2, 2), 0.5), "no scalar"),
        ((torch.ones(()), torch.ones(())), "batch dimension"),
        (([torch.ones(2)], torch.ones(())), "batch dimension"),
        ((torch.ones(2, 2), torch.ones(()), 0), "is 0"),
        ((torch.ones(2, 2), torch.ones(()), 1.5), "is 1.5"),
        ((torch.ones(0, 2), torch.ones(())), "is 0"),
        ((torch.ones(2, 2), torch.ones(())), "no graph"),
    ],
)
def test_what_else_a_closure_returns_is_refused(returned: object, message: str):
    with pytest.raises(KfdistError, match=message):
        Replay(lambda: returned, (), network(), CPU).first()  # pyright: ignore[reportArgumentType, reportReturnType]

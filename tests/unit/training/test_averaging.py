"""The moving average of the weights: what it is, that looking changes nothing, and that it can be saved."""

import pytest
import torch
from torch import Tensor, nn

from kfdist.errors import ModelChanged
from kfdist.training.averaging import WeightAverage


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_it_is_the_exponential_average_of_parameters_and_batch_norms_statistics():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    average, expected = WeightAverage(model, 0.9), weights(model)
    for _ in range(3):
        model(torch.randn(8, 3))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        average.update()
        expected = {name: 0.9 * value + 0.1 * model.state_dict()[name] for name, value in expected.items()}
    before = weights(model)
    with average.in_place():
        now = weights(model)
    for name in ("0.weight", "0.bias", "1.weight", "1.running_mean", "1.running_var"):
        torch.testing.assert_close(now[name], expected[name])
    assert now["1.num_batches_tracked"] == 3
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())

    other = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    restored, own = WeightAverage(other, 0.9), average.own_state()
    twice = {name: 3 * value for name, value in own.items()}
    restored.load(average.shared_state(), [own, twice])
    with restored.in_place():
        assert torch.equal(other[0].weight, expected["0.weight"]) or torch.allclose(
            other[0].weight, expected["0.weight"]
        )
        torch.testing.assert_close(other[1].running_mean, 2 * expected["1.running_mean"])


class Replacing(nn.Module):
    """Puts new tensors in the place of its buffers at each forward; one of them is as long as the batch."""

    mean: Tensor
    cache: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("cache", torch.zeros(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.5 * self.mean + 0.5 * x.mean(0)
        self.cache = x[:, 0].clone()
        return self.weight * (x - self.mean)


def test_a_buffer_that_a_forward_replaces_is_followed_and_an_evaluation_leaves_it_as_it_was():
    model = Replacing()
    average, expected = WeightAverage(model, 0.9), torch.zeros(2)
    for value in (1.0, 3.0):
        model(torch.full((4, 2), value))
        average.update()
        expected = 0.9 * expected + 0.1 * model.mean
    before, values = model.mean, model.mean.clone()
    assert values.tolist() == [1.75, 1.75]
    with average.in_place():
        torch.testing.assert_close(model.mean, expected)
        model(torch.full((6, 2), 7.0))
    assert model.mean is before and torch.equal(model.mean, values)


def test_a_buffer_of_another_shape_than_before_begins_its_average_anew():
    model = Replacing()
    average = WeightAverage(model, 0.9)
    for count in (4, 6):
        model(torch.full((count, 2), float(count)))
        average.update()
    with average.in_place():
        assert model.cache.tolist() == [6.0] * 6
    restored = WeightAverage(other := Replacing(), 0.9)
    restored.load(average.shared_state(), [average.own_state()])
    with restored.in_place():
        assert other.cache.tolist() == [0.0]
        assert torch.equal(other.mean, average.own_state()["mean"])


def test_a_weight_that_is_gone_and_a_parameter_of_another_shape_are_refused_by_name():
    model = Replacing()
    average = WeightAverage(model, 0.9)
    model.weight = nn.Parameter(torch.ones(3))
    with pytest.raises(ModelChanged, match=r"parameter 'weight' is \[3\].* and was \[2\]"):
        average.update()
    model.weight = nn.Parameter(torch.ones(2))
    model.register_buffer("mean", None)
    with pytest.raises(ModelChanged, match=r"'mean' is None and was a tensor .*optimizer\.average_decay"):
        average.update()

"""The moving average of the weights: what it is, that looking changes nothing, and that it can be saved."""

import torch
from torch import nn

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

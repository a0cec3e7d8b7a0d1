"""What a user's functions return is looked at before anything starts: each wrong thing has its sentence."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kfdist.config import load_config
from kfdist.data.objective import Objective
from kfdist.data.reading import CorruptExample
from kfdist.data.task import DataSet, Examples
from kfdist.errors import ConfigError
from kfdist.training.trial import try_own_data, try_own_task

CPU = torch.device("cpu")


class Read:
    """A map-style data set of the user's, whose examples are what a function returns."""

    def __init__(self, example: Callable[[int], Any]) -> None:
        self.example = example

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Any:
        return self.example(index)


class Mean(Objective):
    """An objective whose loss, measures and names are given."""

    def __init__(self, loss: Any = None, measures: Any = None, metrics: Any = ()) -> None:
        self._loss, self._measures, self.metrics = loss, measures, metrics

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return self._loss(output) if self._loss else output.mean()

    def measure(self, output: Tensor, target: Tensor) -> Tensor:
        return self._measures(output) if self._measures else torch.zeros(len(self.metrics))


def examples(labels: Tensor | None = None) -> Examples:
    return Examples(inputs=torch.randn(12, 6), labels=torch.arange(12) % 3 if labels is None else labels)


def good(index: int) -> tuple[Tensor, int]:
    return torch.randn(6), index % 3


def attempt(data: DataSet[Any], model: nn.Module | None = None, *, processes: int = 0, name: str = "a:b") -> nn.Module:
    model = model or nn.Linear(6, 3)
    given = [f"data.name={name}", f"model.name={name}", f"data.loader_processes={processes}"]
    config = load_config(None, overrides=given, environment={})
    try_own_data(config, data)
    try_own_task(config, data, model, CPU)
    return model


def task(train: Any = None, test: Any = None, **given: Any) -> DataSet[Any]:
    return DataSet(train=train or examples(), test=test or examples(), classes=3, **given)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (task(examples(torch.arange(12))), r"train\.labels go from 0 to 11, and classes is 3"),
        (task(test=examples(-torch.ones(12, dtype=torch.int64))), r"test\.labels go from -1 to -1"),
        (task(examples(torch.rand(12))), r"train\.labels are float32 \[12\]; they must be int64"),
        (task(Read(lambda i: (torch.randn(6), 1, 2))), r"train\[0\] is a tuple of 3 \(Tensor, int, int\)"),
        (task(Read(lambda i: torch.randn(6))), r"train\[0\] is float32 \[6\]; it must be \(input, target\)"),
        (task(test=Read(lambda i: (torch.randn(6), "cat"))), "the targets of test make a tuple of 2"),
        (task(Read(lambda i: ([1.0, 2.0], 1))), "the inputs of train make a list of 2"),
        (task(Read(lambda i: (torch.randn(6 + i), 1))), "the first examples of train make no batch"),
        (task(prepare=lambda inputs: None), "prepare returned a value of type NoneType"),
        (task(objective=Mean(loss=lambda output: output)), r"loss returned float32 \[2, 3\]; .* a scalar"),
        (task(objective=Mean(loss=lambda output: output.mean().detach())), r"float32 \[\], without a gradient"),
        (task(objective=Mean(loss=lambda output: 1.0)), "loss returned a value of type float"),
        (task(objective=Mean(metrics="accuracy")), "metrics is 'accuracy'; it must be a tuple of names"),
        (
            task(objective=Mean(metrics=("a", "b"), measures=lambda output: output.sum()[None])),
            r"measure returned float32 \[1\]; .* each of \('a', 'b'\)",
        ),
    ],
)
def test_wrong_data_are_refused(data: DataSet[Any], words: str):
    with pytest.raises(ConfigError, match=rf"^data\.name: .*{words}"):
        attempt(data)
    attempt(data, name="digits")  # what is kfdist's own isn't tried


@pytest.mark.parametrize("output", [lambda x: (x, 1), lambda x: x.sum(), lambda x: x[:1]])
def test_a_model_must_return_a_tensor_with_the_examples_first(output: Callable[[Tensor], Any]):
    class Wrong(nn.Linear):
        def forward(self, input: Tensor) -> Any:
            return output(super().forward(input))

    with pytest.raises(ConfigError, match=r"^model\.name: the model returned .* for 2 examples; it must return one"):
        attempt(task(), Wrong(6, 3))


def test_examples_come_in_pairs_and_there_are_classes():
    with pytest.raises(ConfigError, match="has 12 inputs and 11 labels; give one for each"):
        examples(torch.zeros(11, dtype=torch.int64))
    with pytest.raises(ConfigError, match="inputs of kfdist.data.Examples are of type list"):
        Examples(inputs=[1.0], labels=torch.zeros(1))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="classes is 0; it must be a whole number of at least 1"):
        DataSet(train=examples(), test=examples(), classes=0)


def test_what_loader_processes_can_not_be_sent_is_said_only_where_there_are_any():
    data = task(Read(lambda index: good(index)), Read(good))
    attempt(data)
    with pytest.raises(ConfigError, match=r"train can't be sent to loader processes .*data\.loader_processes = 0"):
        attempt(data, processes=1)


def test_errors_of_the_users_code_are_shown_with_what_it_was_given():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as raised:
        attempt(task(), nn.Linear(5, 3))
    assert raised.value.__notes__ == [
        "kfdist tried the task before it starts anything: the model got float32 [2, 6], the first inputs of train"
    ]
    with pytest.raises(IndexError) as raised:
        attempt(task(), nn.Linear(6, 1))
    assert "objective.loss got output float32 [2, 1], target int64 [2]" in raised.value.__notes__[0]


def test_a_right_one_is_left_as_it_was():
    """An unreadable first example doesn't hide the others; no draw, no count and no mode changes."""

    def first_is_damaged(index: int) -> tuple[Tensor, int]:
        if index == 0:
            raise CorruptExample("0", "damaged")
        return good(index)

    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 3))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.get_rng_state()
    attempt(task(Read(first_is_damaged), Read(good)), model)
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator) and all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())

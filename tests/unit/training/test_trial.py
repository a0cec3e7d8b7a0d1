"""What a user's functions return is looked at before anything starts: each wrong thing has its sentence."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kfdist.config import load_config
from kfdist.data.objective import Classification, Objective
from kfdist.data.reading import CorruptExample
from kfdist.data.task import DataSet, Examples
from kfdist.errors import ConfigError, EnvironmentFault
from kfdist.training.setup import gather_materials
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


def attempt(data: DataSet[Any], model: nn.Module | None = None, *, name: str = "a:b") -> nn.Module:
    model = model or nn.Linear(6, 3)
    config = load_config(None, overrides=[f"data.name={name}", f"model.name={name}"], environment={})
    try_own_data(config, data, CPU)
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
        (task(Read(lambda i: (torch.randn(6 + i), 1))), r"examples \[0, 1\] of train make no batch"),
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


def test_a_kind_of_classification_may_have_other_labels():
    class Soft(Classification):
        def measure(self, output: Tensor, target: Tensor) -> Tensor:
            return super().measure(output, target.argmax(1))

    soft = examples(torch.full((12, 3), 1 / 3))
    attempt(task(soft, soft, objective=Soft()))
    with pytest.raises(ConfigError, match=r"they must be int64 \[N\]"):
        attempt(task(soft, soft, objective=Classification()))


def damaged(*indices: int) -> Read:
    def read(index: int) -> tuple[Tensor, int]:
        if index in indices:
            raise CorruptExample(f"file {index}", "damaged")
        return good(index)

    return Read(read)


def test_two_examples_are_tried_wherever_they_are_readable():
    """One alone would make a model wrong whose output loses dimensions of one."""

    class Squeezed(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).squeeze()

    sizes = Mean(loss=lambda output: output.mean() if len(output) == 2 else None)
    attempt(task(damaged(0), damaged(0, 2, 3), objective=sizes), Squeezed(6, 1))
    with pytest.raises(EnvironmentFault, match="none of the first 12 examples of test can be read; .*damaged"):
        attempt(task(test=damaged(*range(12))))


class OnGpus(nn.Linear):
    """A user's model, and what prepares a user's data, that work on GPUs only."""

    def forward(self, input: Tensor) -> Tensor:
        raise AssertionError("not on a GPU")


def own_model(example_shape: tuple[int, ...], classes: int) -> nn.Module:
    return OnGpus(*example_shape, classes)


def own_data(prepares: bool) -> DataSet[Any]:
    return task(prepare=OnGpus(6, 3)) if prepares else task()


@pytest.mark.parametrize(
    ("device", "there", "tried"),
    [("cuda", 1, False), ("cuda", 0, False), ("auto", 1, False), ("auto", 0, True), ("cpu", 1, True)],
)
def test_a_launcher_computes_nothing_where_ranks_have_gpus(
    monkeypatch: pytest.MonkeyPatch, device: str, there: int, tried: bool
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(there))
    given = [f"data.name={__name__}:own_data", f"model.name={__name__}:own_model", "data.batch_size=4"]
    for prepares in ("true", "false"):
        more = [f"data.settings.prepares={prepares}", f"run.device={device}", "preconditioner.method=none"]
        config = load_config(None, overrides=[*given, *more], environment={})
        with pytest.raises(AssertionError, match="not on a GPU") if tried else nullcontext():
            gather_materials(config, 1, CPU)


def test_errors_of_the_users_code_are_shown_with_what_it_was_given():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as raised:
        attempt(task(), nn.Linear(5, 3))
    assert raised.value.__notes__ == [
        "kfdist tried the task before it starts anything: the model got float32 [2, 6], the first inputs of train"
    ]
    with pytest.raises(IndexError) as raised:
        attempt(task(), nn.Linear(6, 1))
    assert "objective.loss got output float32 [2, 1], target int64 [2]" in raised.value.__notes__[0]
    with pytest.raises(ValueError, match="no such file") as raised:
        attempt(task(Read(lambda index: good(index) if not index else [int("no such file")])))
    assert raised.value.__notes__ == ["kfdist tried the task before it starts anything: train[1] was asked for"]


def test_a_right_one_is_left_as_it_was():
    """No draw, no count and no mode changes, nor do the examples."""

    class Counting(nn.Linear):
        """Replaces a buffer, has one that can't be written to, and writes to its input."""

        def __init__(self) -> None:
            super().__init__(6, 4)
            self.register_buffer("count", torch.zeros(1))
            self.register_buffer("wide", torch.zeros(1).expand(5))

        def forward(self, input: Tensor) -> Tensor:
            self.count = self.count + 1
            return super().forward(input.mul_(2.0))

    model = nn.Sequential(Counting(), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 3))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    held = examples()
    inputs, generator = held.inputs.clone(), torch.get_rng_state()
    attempt(task(damaged(0), damaged()), model)
    attempt(task(held, held, prepare=lambda inputs: inputs.div_(255.0)), model)
    assert torch.equal(held.inputs, inputs)
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator) and all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_modes_are_put_back_by_train_which_may_do_more():
    class Merging(nn.Linear):
        """Merges weights for evaluation, as layers of low-rank updates do."""

        merged = False

        def train(self, mode: bool = True) -> "Merging":
            self.merged = not mode
            return super().train(mode)

    model = nn.Sequential(Merging(6, 6), Merging(6, 3), nn.Dropout())
    model[1].eval()
    attempt(task(), model)
    assert [module.training for module in model] == [True, False, True]
    assert [module.merged for module in model[:2]] == [False, True]

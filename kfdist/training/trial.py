"""The user's own model and data are tried on two examples: what doesn't fit is said before anything starts."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from kfdist.config import Config
from kfdist.config.named_functions import is_own
from kfdist.data.objective import Classification
from kfdist.data.reading import CorruptExample, seeded
from kfdist.data.task import DataSet, Examples
from kfdist.errors import ConfigError, EnvironmentFault
from kfdist.training.evaluation_mode import in_evaluation

_TRIED = 2
_ASKED = 100
"""How many examples are asked for until two can be read."""
_IGNORED = -100
"""The label that torch's cross entropy leaves out."""


def try_own_data(config: Config, data: DataSet[Any], device: torch.device | None) -> None:
    """Reads two examples of each part, and prepares them; does nothing where the data are kfdist's own.

    What the user's code raises goes through, with a note of what it was asked for.

    Args:
        config: The configuration.
        data: The task.
        device: Where the rank computes; None where this process isn't to compute: nothing is prepared.

    Raises:
        ConfigError: Something has another type, shape or range than docs/own-tasks.md says.
        EnvironmentFault: None of many examples can be read.
    """
    if not is_own(config.data.name):
        return
    _check_labels(data)
    for part in ("train", "test"):
        inputs = _batch(data, part)[0]
        if device is None:
            continue
        inputs = data.prepare(inputs.to(device))
        if not isinstance(inputs, Tensor):
            raise ConfigError(f"prepare returned {_described(inputs)}; it must return a tensor", path="data.name")


def try_own_task(config: Config, data: DataSet[Any], model: nn.Module, device: torch.device) -> None:
    """Forwards and measures two examples of each part; does nothing where model and data are kfdist's own.

    The model is as before afterwards, and torch's generators are. What the user's code raises goes through, with a note
    of what it was given.

    Args:
        config: The configuration.
        data: The task, on the device.
        model: The model, on the device.
        device: Where the rank computes.

    Raises:
        ConfigError, EnvironmentFault: As for `try_own_data`.
    """
    if not (is_own(config.model.name) or is_own(config.data.name)):
        return
    for part in ("train", "test"):
        inputs, targets = _batch(data, part)
        inputs = data.prepare(inputs.to(device))
        with _left_as_it_is(model, device), _autocast(config, device):
            with _noted(f"the model got {_described(inputs)}, the first inputs of {part}"):
                output = model(inputs)
            _check_output(output, len(inputs))
            _check_objective(data, output, targets.to(device))


def _check_labels(data: DataSet[Any]) -> None:
    if type(data.objective) is not Classification:  # a class derived from it may take other labels
        return
    for part in ("train", "test"):
        examples = getattr(data, part)
        if not isinstance(examples, Examples):
            continue
        labels = examples.labels
        if labels.dtype != torch.int64 or labels.dim() != 1:
            raise ConfigError(f"{part}.labels are {_described(labels)}; they must be int64 [N]", path="data.name")
        counted = labels[labels != _IGNORED]
        if counted.numel() and (int(counted.min()) < 0 or int(counted.max()) >= data.classes):
            raise ConfigError(
                f"{part}.labels go from {int(counted.min())} to {int(counted.max())}, and classes is {data.classes}; "
                f"they must be from 0 to {data.classes - 1}",
                path="data.name",
            )


def _batch(data: DataSet[Any], part: str) -> tuple[Tensor, Tensor]:
    """Returns a copy of two examples: what is prepared or forwarded may be written to."""
    examples = getattr(data, part)
    if isinstance(examples, Examples):
        return examples.inputs[:_TRIED].clone(), examples.labels[:_TRIED].clone()
    read = _read(examples, part)
    try:
        inputs, targets = default_collate([tuple(example) for example in read.values()])
    except (RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"examples {list(read)} of {part} make no batch ({error}); inputs must be tensors of one shape, and "
            "targets tensors of one shape or numbers",
            path="data.name",
        ) from error
    for name, value in (("inputs", inputs), ("targets", targets)):
        if not isinstance(value, Tensor):
            index, example = next(iter(read.items()))
            raise ConfigError(
                f"the {name} of {part} make {_described(value)}, not a tensor: {part}[{index}] is "
                f"{_described(example)}; inputs must be tensors, and targets tensors or numbers",
                path="data.name",
            )
    return inputs, targets


def _read(examples: Any, part: str) -> dict[int, Any]:
    read: dict[int, Any] = {}
    corrupt: CorruptExample | None = None
    asked = min(len(examples), _ASKED)
    for index in range(asked):
        try:
            with _noted(f"{part}[{index}] was asked for"), seeded(index):
                example = examples[index]
        except CorruptExample as found:
            corrupt = found
            continue
        if not isinstance(example, tuple | list) or len(example) != 2:
            raise ConfigError(f"{part}[{index}] is {_described(example)}; it must be (input, target)", path="data.name")
        read[index] = example
        if len(read) == _TRIED:
            return read
    if not read:
        raise EnvironmentFault(f"none of the first {asked} examples of {part} can be read; the last: {corrupt}")
    return read


def _check_output(output: Any, examples: int) -> None:
    if not isinstance(output, Tensor) or not output.dim() or len(output) != examples:
        raise ConfigError(
            f"the model returned {_described(output)} for {examples} examples; it must return one tensor, with the "
            "examples in its first dimension",
            path="model.name",
        )


def _check_objective(data: DataSet[Any], output: Tensor, targets: Tensor) -> None:
    objective = data.objective
    metrics: Any = objective.metrics
    if not isinstance(metrics, tuple) or not all(isinstance(name, str) for name in metrics):
        raise ConfigError(f"objective.metrics is {metrics!r}; it must be a tuple of names", path="data.name")
    given = f"output {_described(output)}, target {_described(targets)}"
    with _noted(f"objective.loss got {given}"):
        loss: Any = objective.loss(output, targets)
    if not isinstance(loss, Tensor) or loss.dim() or not loss.requires_grad:
        found = _described(loss) + ("" if getattr(loss, "requires_grad", True) else ", without a gradient")
        raise ConfigError(
            f"objective.loss returned {found}; it must return the mean over the batch, a scalar with a gradient",
            path="data.name",
        )
    with _noted(f"objective.measure got {given}"):
        measured: Any = objective.measure(output.detach(), targets)
    if not isinstance(measured, Tensor) or measured.shape != (len(metrics),):
        raise ConfigError(
            f"objective.measure returned {_described(measured)}; it must return a vector with a number for each of "
            f"{metrics}",
            path="data.name",
        )


@contextmanager
def _left_as_it_is(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluates inside, with gradients; modes, buffers and generators are put back."""
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False)
    ]
    try:
        forked = torch.random.fork_rng([device] if device.type == "cuda" else [])
        with forked, torch.enable_grad(), in_evaluation(model):
            yield
    finally:
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                setattr(module, name, buffer)  # a forward may put another one in its place
                # One that is expanded can't be written to. Sparse ones can't be compared.
                if buffer.layout != torch.strided or not torch.equal(buffer, value):
                    buffer.copy_(value)


@contextmanager
def _noted(what: str) -> Iterator[None]:
    try:
        yield
    except CorruptExample:
        raise
    except Exception as error:
        error.add_note(f"kfdist tried the task before it starts anything: {what}")
        raise


def _autocast(config: Config, device: torch.device) -> torch.autocast:
    half = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(config.run.precision)
    return torch.autocast(device.type, dtype=half, enabled=half is not None)


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)} ({', '.join(type(each).__name__ for each in value[:4])})"
    return f"a value of type {type(value).__name__}"

"""The user's own model and data are tried on two examples: what doesn't fit is said before anything starts."""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kfdist.config import Config
from kfdist.config.named_functions import is_own
from kfdist.data.objective import Classification
from kfdist.data.reading import EVALUATION, CorruptExample, SeededReader, seeded
from kfdist.data.task import DataSet, Examples
from kfdist.errors import ConfigError

_TRIED = 2
_IGNORED = -100
"""The label that torch's cross entropy leaves out."""


def try_own_data(config: Config, data: DataSet[Any]) -> None:
    """Reads two examples of each part; does nothing where the data are kfdist's own.

    What the user's code raises goes through, with a note of what it was asked for.

    Args:
        config: The configuration.
        data: The task.

    Raises:
        ConfigError: Something has another type, shape or range than docs/own-tasks.md says.
    """
    if not is_own(config.data.name):
        return
    _check_labels(data)
    if config.data.loader_processes:
        _check_sent(data)
    for part in ("train", "test"):
        inputs = data.prepare(_batch(data, part)[0])
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
        ConfigError: As for `try_own_data`.
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
    if not isinstance(data.objective, Classification):
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


def _check_sent(data: DataSet[Any]) -> None:
    for part in ("train", "test"):
        examples = getattr(data, part)
        if isinstance(examples, Examples):
            continue
        try:
            pickle.dumps(examples)
        except Exception as error:  # whatever its parts raise
            raise ConfigError(
                f"{part} can't be sent to loader processes ({error}); let it hold paths and numbers, and functions by "
                "name, or set data.loader_processes = 0",
                path="data.name",
            ) from error


def _batch(data: DataSet[Any], part: str) -> tuple[Tensor, Tensor]:
    examples = getattr(data, part)
    if isinstance(examples, Examples):
        return examples.inputs[:_TRIED], examples.labels[:_TRIED]
    try:
        with _noted(f"{part}[0] was asked for"), seeded(0):
            first = examples[0]
    except CorruptExample:
        return SeededReader(data=examples, seed=0).__getitems__((0, [0]))[:2]
    if not isinstance(first, tuple | list) or len(first) != 2:
        raise ConfigError(f"{part}[0] is {_described(first)}; it must be (input, target)", path="data.name")
    try:
        batch = SeededReader(data=examples, seed=0).__getitems__((EVALUATION, range(min(_TRIED, len(examples)))))
    except (RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"the first examples of {part} make no batch ({error}); inputs must be tensors of one shape, and targets "
            "tensors of one shape or numbers",
            path="data.name",
        ) from error
    for name, value in (("inputs", batch.inputs), ("targets", batch.targets)):
        if not isinstance(value, Tensor):
            raise ConfigError(
                f"the {name} of {part} make {_described(value)}, not a tensor: {part}[0] is {_described(first)}; "
                "inputs must be tensors, and targets tensors or numbers",
                path="data.name",
            )
    return batch.inputs, batch.targets


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
    modes = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
            model.eval()
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        with torch.no_grad():
            for buffer, value in buffers:
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

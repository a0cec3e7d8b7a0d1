"""Optimizers by name, torch's and kfdist's own, and learning rates as pure functions of the step."""

import inspect
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kfdist import checks
from kfdist.config import OptimizerSection
from kfdist.config.task_sections import OWN_OPTIMIZER
from kfdist.errors import CheckpointError, ConfigError
from kfdist.optim.optimizer import Optimizer, check_graft, check_settings
from kfdist.runtime.plan.groups import BlockGroup
from kfdist.runtime.preconditioner import Preconditioner
from kfdist.runtime.settings import StepReport
from kfdist.torch_internals import CompilerFreeOptimizer, never_compiled

_UNFIT = frozenset({"Optimizer", "LBFGS", "SparseAdam"})
"""The base class, one that needs a closure, one for sparse gradients only."""


class RanksOptimizer(Optimizer, CompilerFreeOptimizer):
    """kfdist's own where a whole step is never compiled, as in `kfdist train`: it loads no compiler."""


RanksOptimizer.__name__ = RanksOptimizer.__qualname__ = Optimizer.__name__  # in messages it is what users know


def optimizers() -> Mapping[str, type[torch.optim.Optimizer]]:
    """Returns the optimizers of torch.optim by their names in lower case."""
    kinds = {name: kind for name, kind in vars(torch.optim).items() if isinstance(kind, type) and name not in _UNFIT}
    return {name.lower(): kind for name, kind in kinds.items() if issubclass(kind, torch.optim.Optimizer)}


def check_optimizer(
    section: OptimizerSection, parameters: Iterable[nn.Parameter], groups: Iterable[BlockGroup]
) -> None:
    """Checks that `optimizer_of` can make the configured optimizer of a model with these parameters and groups.

    Raises:
        ConfigError: It can't.
    """
    if section.name != OWN_OPTIMIZER:
        make_optimizer(section, parameters)
        return
    settings = _own_settings(section)
    try:
        check_graft(settings["graft"], groups)
    except ConfigError as error:
        raise error.under("optimizer.settings") from None


def optimizer_of(section: OptimizerSection, preconditioner: Preconditioner) -> torch.optim.Optimizer:
    """Makes the configured optimizer of a preconditioner's model; kfdist's own has it, see `precondition`.

    Raises:
        ConfigError: As for `make_optimizer`.
    """
    parameters = preconditioner.model.parameters()
    if section.name != OWN_OPTIMIZER:
        return make_optimizer(section, parameters)
    settings = _own_settings(section)
    return RanksOptimizer(preconditioner, params=_groups(section, parameters), **settings)


def precondition(preconditioner: Preconditioner, optimizer: torch.optim.Optimizer) -> StepReport:
    """Makes the preconditioner's part of a step, which kfdist's own optimizer asks for itself."""
    return optimizer.precondition() if isinstance(optimizer, Optimizer) else preconditioner.step()


def _groups(section: OptimizerSection, parameters: Iterable[nn.Parameter]) -> Any:
    groups = list(parameters)
    if section.decay_vectors:
        return groups
    vectors = [parameter for parameter in groups if parameter.dim() <= 1]
    matrices = [parameter for parameter in groups if parameter.dim() > 1]
    return [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]


def _own_settings(section: OptimizerSection) -> dict[str, Any]:
    """Returns what kfdist's own optimizer is made with; `momentum` is its first beta unless `betas` are given."""
    defaults = {"graft": "adamw", "betas": (section.momentum, 0.999), "eps": 1e-8}
    for key in section.settings:
        if key not in defaults:
            near = checks.suggestion(key, defaults) or ";"
            raise ConfigError(
                f"unknown key{near} {section.name} takes: {', '.join(sorted(defaults))}",
                path=f"optimizer.settings.{key}",
            )
    found = {**defaults, **section.settings, "lr": section.lr, "weight_decay": section.weight_decay}
    if found["graft"] == "none":  # TOML has no null
        found["graft"] = None
    try:
        check_settings(found)
    except ConfigError as error:
        raise error.under("optimizer.settings") from None
    return found


def make_optimizer(section: OptimizerSection, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Makes the configured optimizer of torch; `momentum` is left out for those that have none.

    Where vectors aren't decayed, they are the second of two groups.

    Raises:
        ConfigError: The name or a setting is unknown, or the optimizer refuses the values.
    """
    known = optimizers()
    kind = known[checks.choice("optimizer.name", section.name, sorted([*known, OWN_OPTIMIZER]))]
    signature = inspect.signature(kind).parameters
    accepted = set(signature) - {"params"}
    for key in section.settings:
        if key not in accepted:
            near = checks.suggestion(key, accepted) or ";"
            raise ConfigError(
                f"unknown key{near} {section.name} takes: {', '.join(sorted(accepted))}",
                path=f"optimizer.settings.{key}",
            )
    arguments = {"lr": section.lr, "momentum": section.momentum, "weight_decay": section.weight_decay}
    # TOML has arrays only, torch wants tuples (betas).
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in section.settings.items()}
    groups = _groups(section, parameters)
    try:
        return never_compiled(kind)(groups, **{k: v for k, v in arguments.items() if k in accepted} | settings)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        defaults = {key: signature[key].default for key in section.settings}
        hint = f"; by default they are {defaults!r}" if defaults else ""
        raise ConfigError(
            f"{section.name} refuses {dict(section.settings)!r}: {error}{hint}", path="optimizer.settings"
        ) from None


def restore_optimizer(optimizer: torch.optim.Optimizer, section: OptimizerSection, saved: Mapping[str, Any]) -> None:
    """Puts an optimizer's state back; its settings stay as configured, which may have changed (run.accept_changes).

    Args:
        optimizer: What `optimizer_of` returned for the section.
        section: The configuration of now.
        saved: The state in a checkpoint.

    Raises:
        CheckpointError: It is of another model, or of an optimizer that keeps something else.
    """
    _check_kept(optimizer, section, saved)
    configured = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(dict(saved))
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"the optimizer's state doesn't fit {section.name}: {error}") from error
    for group, settings in zip(optimizer.param_groups, configured, strict=True):
        group.update(settings)  # torch has put the checkpoint's in their place


def _check_kept(optimizer: torch.optim.Optimizer, section: OptimizerSection, saved: Mapping[str, Any]) -> None:
    """Refuses a state that lacks what the optimizer goes on from: torch's would fail at the first step."""
    if section.name == OWN_OPTIMIZER:
        return  # it begins anew what isn't there
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    needed = {dim: _kept_by(section, dim) for dim in {parameter.dim() for parameter in parameters}}
    for parameter, number in zip(parameters, numbers, strict=False):  # how many there are, torch compares
        kept = saved["state"].get(number, {}).keys()
        if kept and not needed[parameter.dim()] <= kept:
            raise CheckpointError(
                f"the checkpoint's optimizer kept {', '.join(sorted(kept))} of a parameter, and {section.name} as "
                f"configured now needs {', '.join(sorted(needed[parameter.dim()]))}: it can't go on from there; undo "
                "the change of [optimizer], or start a new run (run.dir)"
            )


def _kept_by(section: OptimizerSection, dim: int) -> set[str]:
    """Returns the names of what an optimizer of torch keeps of a parameter, which it makes in the first step."""
    parameter = nn.Parameter(torch.zeros([2] * dim, dtype=torch.float32, device="cpu"))
    optimizer = make_optimizer(section, [parameter])
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return set(optimizer.state[parameter])


@dataclass(frozen=True, kw_only=True)
class LearningRate:
    """The learning rate as a function of the step; nothing of it needs saving.

    Rises linearly to the peak over the warm-up, then falls to `final_lr_fraction` of it at the schedule's end.

    Attributes:
        section: What is configured.
        total_steps: Steps of the whole run.
        steps_per_epoch: Steps of a pass over the data; for what is configured in epochs.
        epoch_zero: Step at which epoch 0 began, or would have at this number of ranks.
        step_examples: Examples that all ranks together take in a step; for `lr_batch_size`.
    """

    section: OptimizerSection
    total_steps: int
    steps_per_epoch: int = 0
    epoch_zero: int = 0
    step_examples: int = 0

    @property
    def peak(self) -> float:
        """The largest learning rate: `lr`, scaled linearly to the run's batch if it is meant for another."""
        meant_for = self.section.lr_batch_size
        return self.section.lr * self.step_examples / meant_for if meant_for else self.section.lr

    def __call__(self, step: int) -> float:
        """Returns the learning rate of step number `step`, counted from 0."""
        section, peak = self.section, self.peak
        warmup = self._step_of(section.warmup_epochs) if section.warmup_epochs else section.warmup_steps
        if step < warmup:
            begin = self.epoch_zero if section.warmup_epochs else 0
            return peak * (step - begin + 1) / (warmup - begin)
        if section.schedule == "constant":
            return peak
        if section.schedule == "step":
            milestones = section.milestones or [self._step_of(epoch) for epoch in section.milestone_epochs]
            return peak * section.milestone_factor ** sum(step >= milestone for milestone in milestones)
        end = self._step_of(section.decay_epochs) if section.decay_epochs else self.total_steps
        progress = (step - warmup) / max(1, end - warmup)
        left = 1.0 - min(1.0, progress)
        if section.schedule == "cosine":
            left = 0.5 * (1.0 - math.cos(math.pi * left))
        elif section.schedule == "polynomial":
            left **= section.power
        return peak * (section.final_lr_fraction + (1.0 - section.final_lr_fraction) * left)

    def _step_of(self, epoch: float) -> int:
        return self.epoch_zero + round(epoch * self.steps_per_epoch)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr

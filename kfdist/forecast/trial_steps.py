"""A few real steps of the configured model, in this process on its CPU: how long a rank's step takes when it is alone.

The model has weights and the examples have values, real ones where the data were looked at. What is measured is the
time of this thread's processor, which also computes its part of what several threads do: others on the machine, and
inversions under way, don't count.
"""

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kfdist.config import Config
from kfdist.forecast.inversion_costs import Costs
from kfdist.forecast.outline import Outline, in_a_line
from kfdist.forecast.rank_memory import bytes_of
from kfdist.models import build_model
from kfdist.policies.staleness import Asap
from kfdist.runtime.plan.planner import Plan
from kfdist.runtime.preconditioner import Preconditioner
from kfdist.training.method import plan_of
from kfdist.training.optimizers import optimizer_of, precondition

_SECONDS = 1.0
"""How long steps are made, once the first one is over, in this thread's time."""

_FEWEST, _WARM = 3, 2
"""Steps that count at least, and those before them that don't."""

_DEAREST_STEP, _DEAREST_INVERSIONS = 0.5, 3.0
"""Seconds of a step's operations, and of the first step's inversions, beyond which nothing is tried."""

_LARGEST = 512 * 2**20
"""Bytes of parameters beyond which nothing is tried."""


@dataclass(frozen=True)
class Trial:
    """What steps took.

    Attributes:
        seconds: Of one, in the mean over `steps`; None if none was made.
        steps: How many counted.
        why_not: Why none was made.
    """

    seconds: float | None
    steps: int = 0
    why_not: str = ""


def try_steps(config: Config, outline: Outline, plan: Plan, costs: Costs, flops: float) -> Trial:
    """Makes some steps, where they are cheap enough.

    Args:
        config: What is to run.
        outline: What an example looks like.
        plan: Of the outline's model.
        costs: Of inversions here.
        flops: Operations of a rank's step.
    """
    inversions = sum(costs.seconds(group) for group in plan.groups if not group.own)
    weights = bytes_of(outline.model.parameters())
    if flops / costs.flops_per_second > _DEAREST_STEP or inversions > _DEAREST_INVERSIONS or weights > _LARGEST:
        return Trial(None, why_not="real steps would take too long here")
    former = torch.get_num_threads()
    torch.set_num_threads(config.cluster.threads)
    try:
        with warnings.catch_warnings(action="ignore"):
            return _Steps(config, outline, plan).run()
    except Exception as error:  # of the user's own code
        return Trial(None, why_not=f"real steps ended with {in_a_line(error)}")
    finally:
        torch.set_num_threads(former)


class _Steps:
    """Steps of one rank that is alone and inverts in a thread of its own."""

    def __init__(self, config: Config, outline: Outline, plan: Plan) -> None:
        self._config = config
        self._objective = outline.example.objective
        self._batch = outline.example.batch_of_values(config.data.batch_size // config.data.micro_batches)
        self._period = plan.settings.schedules(len(plan.groups))[0].inverse_period
        self._costs = plan.costs
        self._model = build_model(
            config.model.name,
            config.model.settings,
            example_shape=outline.example.shape,
            classes=outline.example.classes,
            seed=config.run.seed,
        ).train()

    def run(self) -> Trial:
        with self._preconditioner() as preconditioner:
            optimizer = optimizer_of(self._config.optimizer, preconditioner)
            seconds: list[float] = []
            while not self._is_enough(seconds):
                begun = time.thread_time()
                optimizer.zero_grad(set_to_none=True)
                for _ in range(self._config.data.micro_batches):
                    self._forward_and_backward(preconditioner)
                precondition(preconditioner, optimizer)
                optimizer.step()
                seconds.append(time.thread_time() - begun)
        counted = seconds[_WARM:]
        return Trial(sum(counted) / len(counted), len(counted))

    def _is_enough(self, seconds: list[float]) -> bool:
        """A whole inverse period shows each block's share; an average of part of one is nearly as good."""
        counted = seconds[_WARM:]
        return len(counted) >= _FEWEST and (len(counted) >= self._period or sum(counted) > _SECONDS)

    @contextmanager
    def _preconditioner(self) -> Iterator[Preconditioner]:
        plan = plan_of(self._config, self._model, world_size=1, costs=self._costs)
        settings = replace(plan.settings, lr=1e-4, adoption=Asap())
        with Preconditioner.from_plan(replace(plan, settings=settings)) as preconditioner:
            yield preconditioner

    def _forward_and_backward(self, preconditioner: Preconditioner) -> None:
        inputs, targets = self._batch
        precision = self._config.run.precision
        half = torch.bfloat16 if precision == "bfloat16" else torch.float16
        with torch.autocast("cpu", dtype=half, enabled=precision != "float32"):
            output = self._model(inputs)
            loss = self._loss(output, targets, preconditioner)
        (loss / self._config.data.micro_batches).backward()

    def _loss(self, output: Tensor, targets: Tensor, preconditioner: Preconditioner) -> Tensor:
        if self._objective is None:
            return output.float().square().mean()
        observation = self._objective.observation(targets)
        if observation is not None:
            preconditioner.observe(output, **observation)
        return self._objective.loss(output, targets)

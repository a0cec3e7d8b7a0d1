"""Settings and plans for tests that look at parts of a preconditioner."""

from typing import Any

from torch import nn

import kfdist
from kfdist.curvature.auto import MeasuredCosts
from kfdist.runtime.plan.planner import Method, Plan, make_plan
from kfdist.runtime.settings import Settings


def settings(**changes: Any) -> Settings:
    """The defaults of `kfdist.Preconditioner` with some changed."""
    defaults: dict[str, Any] = {
        "damping": 1e-3,
        "ema_decay": 0.95,
        "factor_period": 10,
        "inverse_period": 100,
        "fisher": "empirical",
        "weight_sharing": "expand",
        "sampling": kfdist.Sampling(),
        "skip": (),
        "kl_clip": 1e-3,
        "lr": None,
        "adoption": kfdist.Asap(),
        "seed": 0,
        "digest_period": 100,
    }
    return Settings(**{**defaults, **changes})


def planned(
    model: nn.Module, method: Method, *, world_size: int = 1, costs: MeasuredCosts | None = None, **changes: Any
) -> Plan:
    """Plans with the default settings but for `changes`."""
    return make_plan(model, method, settings(**changes), world_size=world_size, costs=costs)

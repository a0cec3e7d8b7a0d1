"""Time to a target accuracy, counted as MLPerf Training counts it.

The clock starts before the first example is asked for and runs until the end of the evaluation that reaches the target:
steps, evaluations and checkpoints, over all starts of the run; what comes before (starting processes, reading the list
of files, making the model) isn't counted. MLPerf's target for ResNet-50 on ImageNet is 75.9 % top-1.
"""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Reached:
    """When a run first reached its target.

    Attributes:
        step: Steps done by then.
        epoch: Passes over the data done by then.
        seconds: Seconds by the clock above.
        accuracy: The test accuracy found.
        weights: Whose it is: "trained", or "averaged".
    """

    step: int
    epoch: int
    seconds: float
    accuracy: float
    weights: str


def target_summary(target: float | None, reached: Reached | None) -> dict[str, Any] | None:
    """Returns what the run's summary says; None without a target."""
    if target is None:
        return None
    return {"target_accuracy": target, "reached": None if reached is None else asdict(reached)}

"""Examples that couldn't be read, over all ranks: told, counted, and too many of them end the run."""

from collections.abc import Mapping
from typing import Any

from kfdist.comm.communicator import Communicator
from kfdist.errors import EnvironmentFault
from kfdist.training.progress import Progress
from kfdist.training.reporting import MetricsLog

_SHOWN = 20
"""How many are named in the summary; metrics.jsonl has all."""


class Unreadable:
    """What couldn't be read in this start, the same on all ranks.

    Args:
        communicator: The ranks.
        limit: The most that may be.
        log: `metrics.jsonl`.
        progress: What users see.

    Attributes:
        reasons: Why, by the examples' names.
    """

    def __init__(self, communicator: Communicator, *, limit: int, log: MetricsLog, progress: Progress) -> None:
        self.reasons: dict[str, str] = {}
        self._communicator = communicator
        self._limit = limit
        self._log, self._progress = log, progress

    def add(self, own: Mapping[str, str]) -> None:
        """Takes in what each rank couldn't read since the last call. All ranks must call it.

        Raises:
            EnvironmentFault: There are more than the limit; raised on all ranks.
        """
        for of_rank in self._communicator.all_gather_json(dict(own)):
            for name, reason in of_rank.items():
                if name not in self.reasons:
                    self.reasons[name] = reason
                    self._log.write("unreadable", name=name, reason=reason)
                    self._progress.say(
                        f"{name} can't be read ({reason}): training takes the next example in its place, evaluation "
                        "leaves it out"
                    )
        if len(self.reasons) > self._limit:
            *_, last = self.reasons.items()
            raise EnvironmentFault(
                f"{len(self.reasons)} examples can't be read, data.corrupt_limit allows {self._limit}; the last is "
                f"{last[0]}: {last[1]}; mend the data, or raise the limit and start again, which resumes"
            )

    def summary(self) -> dict[str, Any]:
        """Returns what the run's summary says."""
        return {"count": len(self.reasons), "examples": dict(list(self.reasons.items())[:_SHOWN])}

"""A local link under the test's script of faults, whose settings a test controls."""

from collections.abc import Sequence
from dataclasses import dataclass

from kfdist.links.link import LinkContext
from kfdist.links.local import LocalLink
from kfdist.types import InForce, JobResult, MetricSample, RunSettings
from tests.support.faults import reach


class FaultyLink(LocalLink):
    """Inverts as `LocalLink` does; faults have results come late, twice or not at all, and delay looks at it.

    Lateness is counted in looks, of which a rank makes one per step or round of a wait, so that a scenario doesn't
    depend on how fast the machine is.

    Attributes:
        wanted: What `settings` returns; a test may replace it at any time.
        step: A fact of the place, for a test's loop to state.
        told: The (step, phase) that the rank told.
        reported: What the rank said that the run goes by.
    """

    def __init__(self) -> None:
        super().__init__()
        self.wanted = RunSettings()
        self.step = 0
        self.told: list[tuple[int, str]] = []
        self.reported: list[InForce] = []
        self._polls = self._results = 0
        self._on_the_way: list[_Arrival] = []
        self._withholds = False

    def start(self, context: LinkContext) -> None:
        for fault in reach("fail", start=context.worker_rank):
            raise OSError(fault.value[0])
        super().start(context)

    def poll(self) -> list[JobResult]:
        self._polls += 1
        reach(poll=self._polls)
        for result in super().poll():
            self._send(result)
        due = [each for each in self._on_the_way if each.due <= self._polls]
        arrived = [each for each in due if not self._withheld(each)]
        self._withholds = len(arrived) < len(due)
        self._on_the_way = [each for each in self._on_the_way if each not in arrived]
        return [each.result for each in arrived]

    def wait(self, seconds: float) -> None:
        # What comes next may depend on the number of polls alone, but for what is withheld.
        super().wait(min(seconds, 0.05 if self._withholds else 0.002))

    def _have_help(self) -> None:
        """Does nothing: one thread alone gives the results in the order that a script of faults counts them in."""

    def settings(self) -> RunSettings:
        return self.wanted

    def beat(self, step: int, phase: str, samples: Sequence[MetricSample]) -> None:
        del samples
        self.told.append((step, phase))

    def report(self, in_force: InForce) -> None:
        self.reported.append(in_force)

    def _send(self, result: JobResult) -> None:
        self._results += 1
        faults = reach("late", "twice", **self._facts(self._results, result))
        for _ in range(1 + sum(fault.kind == "twice" for fault in faults)):
            late = sum(fault.random().randint(0, fault.value[0]) for fault in faults if fault.kind == "late")
            self._on_the_way.append(_Arrival(self._polls + late, self._results, result))

    def _withheld(self, arrival: "_Arrival") -> bool:
        return bool(reach("withhold", **self._facts(arrival.number, arrival.result)))

    def _facts(self, number: int, result: JobResult) -> dict[str, object]:
        return {"result": number, "group": result.group, "version": result.version, "step": self.step}


@dataclass(frozen=True, eq=False)
class _Arrival:
    """A result that is there, but seen only from the look number `due` on."""

    due: int
    number: int
    result: JobResult

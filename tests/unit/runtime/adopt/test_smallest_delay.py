"""The earliest adoption that the protocol allows, of results that are there as soon as they are asked for."""

from typing_extensions import override

import kfdist
from kfdist.links.link import LinkContext
from kfdist.links.local import LocalLink, _invert
from kfdist.policies.staleness import SMALLEST_DELAY, oldest
from kfdist.types import Job
from tests.support.preconditioning import backward, preconditioner, two_layers

PERIOD = 3


class AtOnce(LocalLink):
    """Inverts before `submit` returns."""

    @override
    def start(self, context: LinkContext) -> None:
        del context

    @override
    def submit(self, job: Job) -> None:
        self._work.done.put(_invert(job, "cpu"))


def test_results_that_are_there_at_once_keep_the_smallest_bound_without_a_wait() -> None:
    model = two_layers()
    bound = oldest(PERIOD, SMALLEST_DELAY)
    adoption = kfdist.Asap(hard_bound=bound)
    delays, ages = set(), set()
    with preconditioner(model, inverse_period=PERIOD, adoption=adoption, link=AtOnce()) as pre:
        for step in range(6 * PERIOD):
            backward(model)
            delays |= {step - version for _, version in pre.step().adopted if step}
            ages |= set(pre.staleness().values()) if step >= PERIOD + SMALLEST_DELAY else set()
        assert pre.counters()["fallbacks"] == {}
    assert delays == {SMALLEST_DELAY}
    assert max(ages) == bound

"""What the bounds on staleness ask for is counted where it is done, and said where it can't be."""

from contextlib import nullcontext
from typing import Any

import pytest
from typing_extensions import override

import kfdist
from kfdist.errors import KfdistWarning
from kfdist.links.link import LinkContext
from kfdist.links.local import LocalLink, _invert
from kfdist.types import Job
from tests.support.preconditioning import backward, preconditioner, two_layers

SOFT, HARD = 5, 6


class FirstAlone(LocalLink):
    """Inverts the first version before `submit` returns, and no other."""

    @override
    def start(self, context: LinkContext) -> None:
        del context

    @override
    def submit(self, job: Job) -> None:
        if job.version == 0:
            self._work.done.put(_invert(job, "cpu"))


COUNTED: dict[str, tuple[Any, bool, dict[str, int]]] = {
    "damped at each step": ("kfac-eigen", True, {"damping_raised": 8, "fallback": 6}),
    "damped at the inversion": ("kfac", False, {"damping_raised": 6, "fallback": 6}),
    "without a damping": ("ekfac-adam", False, {"kept": 6}),
    "mixed": ({"0": "kfac-eigen", "*": "ekfac-adam"}, True, {"damping_raised": 4, "fallback": 3, "kept": 3}),
}
"""By method: whether any of its directions obey damping, and what of two blocks is counted in steps 0 to 9."""


@pytest.mark.parametrize(("method", "obeys", "counted"), COUNTED.values(), ids=COUNTED.keys())
def test_what_a_bound_asks_for_is_counted_where_it_is_done(method: Any, obeys: bool, counted: dict[str, int]) -> None:
    model = two_layers()
    adoption = kfdist.Asap(soft_bound=SOFT, hard_bound=HARD, at_hard_bound="fallback")
    said = nullcontext() if obeys else pytest.warns(KfdistWarning, match=rf"^soft_bound = {SOFT} does nothing: ")
    with said:
        pre = preconditioner(model, method, inverse_period=3, adoption=adoption, link=FirstAlone())
    with pre:
        for _ in range(10):
            model.zero_grad()
            backward(model)
            pre.step()
        assert pre.versions() == {"0": 0, "2": 0}
        assert pre.counters()["fallbacks"] == counted

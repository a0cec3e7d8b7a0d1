"""A schedule that gives nonsense is refused on all ranks at one step, also where rank 0 tells a controller of it."""

import pytest

from kfdist.comm.communicator import Communicator
from kfdist.errors import ConfigError
from kfdist.policies.staleness import FixedLag
from tests.support.adoption_runs import TrainingRank
from tests.support.ranks import run_ranks

BAD = 3


def refused(communicator: Communicator, name: str) -> tuple[int, int, str]:
    """Trains until the schedule fails; beats before each step, as `kfdist train` does."""
    rank = TrainingRank(communicator, adoption=FixedLag(1), **{name: lambda step: 0.1 if step < BAD else "a word"})
    try:
        while True:
            rank.pre.beat("running")
            rank.step()
    except ConfigError as error:
        pipeline = rank.pre.pipeline
        return pipeline.next_step, pipeline.statistics_step, str(error)
    finally:
        rank.pre.abandon()


@pytest.mark.parametrize("name", ["kl_clip", "damping"])
def test_a_schedule_that_gives_no_number_is_refused_on_all_ranks_before_they_wait_for_each_other(name: str) -> None:
    message = f"the {name} schedule gave 'a word' at step {BAD}; a positive, finite number is needed"
    assert run_ranks(2, refused, name) == [(BAD, BAD - 1, message)] * 2

"""Which rank trains on what: a permutation, dealt without gaps or repeats, from any position."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from kfdist.data.sampler import Position, Sampler
from kfdist.errors import ConfigError

samplers = st.builds(
    dict, examples=st.integers(1, 200), batch_size=st.integers(1, 20), world_size=st.integers(1, 5), seed=st.integers(0)
)


def make(values: dict[str, int]) -> Sampler:
    assume(values["examples"] >= values["batch_size"] * values["world_size"])
    return Sampler(**values)


def walk(sampler: Sampler, position: Position, steps: int) -> list[list[int]]:
    """What each step takes, all ranks in order."""
    taken = []
    for _ in range(steps):
        ranks = [sampler.indices(position, rank) for rank in range(sampler.world_size)]
        assert all(len(each) == sampler.batch_size for each in ranks)
        taken.append(torch.cat(ranks).tolist())
        position = sampler.advance(position)
    return taken


@given(samplers, st.integers(0, 5))
def test_an_epoch_deals_every_example_at_most_once_and_leaves_less_than_a_step(values: dict[str, int], epoch: int):
    sampler = make(values)
    taken = sum(walk(sampler, Position(epoch=epoch), sampler.steps_per_epoch), [])
    assert len(set(taken)) == len(taken)
    assert 0 <= sampler.examples - len(taken) < sampler.step_examples
    assert set(taken) <= set(range(sampler.examples))


@given(samplers, st.integers(1, 30), st.integers(0, 30))
def test_a_run_resumed_in_the_middle_sees_the_same_examples(values: dict[str, int], steps: int, stop: int):
    sampler = make(values)
    stop = min(stop, steps)
    whole = walk(sampler, Position(), steps)
    position = Position()
    for _ in range(stop):
        position = sampler.advance(position)
    # A position survives being saved: it is two numbers.
    resumed = Position(epoch=position.epoch, offset=position.offset)
    assert walk(sampler, sampler.start(resumed), steps - stop) == whole[stop:]


@given(samplers, st.integers(1, 5), st.integers(0, 20))
def test_another_number_of_ranks_goes_on_where_the_old_ones_stopped(values: dict[str, int], ranks: int, stop: int):
    old = make(values)
    new = make({**values, "world_size": ranks})
    stop = min(stop, old.steps_per_epoch - 1)
    position = Position(offset=stop * old.step_examples)
    seen = set(sum(walk(old, Position(), stop), []))
    position = new.start(position)
    if position.epoch == 0:
        left = (new.examples - position.offset) // new.step_examples
        assert seen.isdisjoint(sum(walk(new, position, left), []))


@given(samplers, st.integers(1, 4), st.integers(0, 40))
def test_steps_until_counts_the_walk(values: dict[str, int], epochs: int, start: int):
    sampler = make(values)
    position = Position()
    for _ in range(start):
        position = sampler.advance(position)
    steps = sampler.steps_until(epochs, position)
    for _ in range(steps):
        assert position.epoch < epochs
        position = sampler.advance(position)
    assert position.epoch >= epochs


@given(samplers, st.integers(1, 5), st.integers(0, 40), st.integers(0, 40))
def test_epoch_zero_stays_where_it_is_once_the_number_of_ranks_does(
    values: dict[str, int], ranks: int, before: int, after: int
):
    """Also where the ranks before left no whole number of steps of an epoch."""
    old, new = make(values), make({**values, "world_size": ranks})
    position = Position()
    for step in range(before):
        assert old.epoch_zero(step, position) == 0
        position = old.advance(position)
    position = new.start(position)
    found = new.epoch_zero(before, position)
    for step in range(before, before + after):
        assert new.epoch_zero(step, position) == found
        if position.offset == 0 and step > before:
            assert step == found + position.epoch * new.steps_per_epoch, "where the epoch really begins"
        position = new.advance(position)


def test_the_order_depends_on_seed_and_epoch_and_nothing_else():
    one = Sampler(examples=100, batch_size=4, world_size=2, seed=1)
    same_order = Sampler(examples=100, batch_size=7, world_size=3, seed=1)
    assert torch.equal(one.permutation(3), same_order.permutation(3))
    assert not torch.equal(one.permutation(3), one.permutation(4))
    assert not torch.equal(one.permutation(3), Sampler(examples=100, batch_size=4, world_size=2, seed=2).permutation(3))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one.permutation(0)
    assert torch.equal(before, torch.get_rng_state())


def test_too_few_examples_say_how_large_a_batch_may_be():
    with pytest.raises(ConfigError, match=r"data\.batch_size: is 60; 2 ranks would take 120 .* at most 50"):
        Sampler(examples=100, batch_size=60, world_size=2, seed=0)

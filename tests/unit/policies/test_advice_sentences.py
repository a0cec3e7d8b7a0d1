"""What is advised: by where the batch stands beside the critical one, and by how many owners keep up."""

import pytest

from kfdist.config import load_config
from kfdist.policies.advice import batch_advice, gain, owner_advice, shortest_period


def test_the_gains_are_those_of_the_table_in_the_docs() -> None:
    assert [round(100 * gain(batch, 1.0)) for batch in (0.25, 1, 4, 16)] == [20, 50, 80, 94]


def test_without_a_noise_scale_there_is_no_critical_batch() -> None:
    (sentence,) = batch_advice(512, None, owners=2, period=10)
    assert "isn't known yet" in sentence and "data.micro_batches = 2" in sentence


@pytest.mark.parametrize(
    ("batch", "words"), [(100, "more ranks pay"), (600, "at twice the cost of each."), (4000, "Past it")]
)
def test_the_advice_follows_the_batch(batch: int, words: str) -> None:
    sentences = batch_advice(batch, 1000.0, owners=2, period=10)
    assert "1,000 examples" in sentences[0]
    assert f"{gain(batch, 1000.0):.0%}" in sentences[0]
    assert words in sentences[1]
    assert (len(sentences) > 2) == (batch > 1000)


def test_past_the_critical_batch_there_is_something_better_to_do() -> None:
    _, past, *instead = batch_advice(4000, 1000.0, owners=2, period=10)
    assert "saves only 10% of the steps" in past  # (1 + 1/8) / (1 + 1/4)
    assert [each.partition(" (")[0] for each in instead][0] == "- more owners than 2"
    assert "inverse_period than 10" in instead[1]
    assert instead[2] == "- a smaller batch: 1,000 examples take about 1.6 times the steps, each 4.0 times cheaper."
    assert "closer to the full curvature" in batch_advice(4000, 1000.0, owners=2, period=1)[3]
    alone = batch_advice(4000, 1000.0, owners=0, period=10)
    assert len(alone) == 3 and "smaller batch" in alone[2]


@pytest.mark.parametrize(
    ("owners", "bound", "words"),
    [
        (1, 60, "staleness reaches 90 steps, above the bound of 60; 3 owners keep it at 58: cluster.owners = 3."),
        (4, 60, "within the bound of 60; 3 would be enough (58)."),
        (3, 60, "With 3 owners staleness reaches 58 steps, within the bound of 60."),
        (2, 50, "no number of owners keeps it within the bound of 50: it is 53 at best, with 4"),
        (1, None, "above 78 steps, half a period beyond the least, 53; 2 owners keep it at 70"),
    ],
)
def test_how_many_owners(owners: int, bound: int | None, words: str) -> None:
    staleness = {1: {50: 90}, 2: {50: 70}, 3: {50: 58}, 4: {50: 53}}
    (sentence,) = owner_advice(owners, staleness, bound, delay=4)
    assert words in sentence


def test_each_block_is_measured_by_its_own_period() -> None:
    """A staleness of 60 is old where a new inverse comes every 20 steps, and young where it comes every 100."""
    staleness = {1: {20: 60, 100: 104}, 2: {20: 24, 100: 103}}
    (sentence,) = owner_advice(1, staleness, None, delay=4)
    assert "reaches 60 steps of blocks inverted every 20, above 33 steps" in sentence
    assert "the least, 23; 2 owners keep it at 24: cluster.owners = 2." in sentence
    (sentence,) = owner_advice(2, staleness, None, delay=4)
    assert "reaches 24 steps of blocks inverted every 20, within 33 steps" in sentence
    (sentence,) = owner_advice(2, {1: {20: 60}, 2: {20: 50}}, None, delay=4)
    assert "no number of owners keeps it within 33 steps" in sentence and "it is 50 at best, with 2." in sentence


def test_what_makes_inverses_younger_is_the_key_that_acts() -> None:
    default = load_config(None, environment={}).preconditioner.model_dump()
    assert shortest_period(default, [20, 100]) == (20, "preconditioner.settings.dense_settings.basis_period")
    assert shortest_period(default, []) == (100, "preconditioner.inverse_period")
    named = load_config(None, environment={}, overrides=["preconditioner.method=b-kfac"]).preconditioner.model_dump()
    assert shortest_period(named, [10]) == (10, "preconditioner.factor_period")
    key = "preconditioner.settings.dense_settings.basis_period"
    instead = batch_advice(4000, 1000.0, owners=2, period=20, period_key=key)[3]
    assert f"a shorter {key} than 20" in instead

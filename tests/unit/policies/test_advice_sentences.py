"""What is advised: by where the batch stands beside the critical one, and by how many owners keep up."""

import pytest

from kfdist.policies.advice import batch_advice, gain, owner_advice


def test_the_gains_are_those_of_the_table_in_the_docs() -> None:
    assert [round(100 * gain(batch, 1.0)) for batch in (0.25, 1, 4, 16)] == [20, 50, 80, 94]


def test_without_a_noise_scale_there_is_no_critical_batch() -> None:
    (sentence,) = batch_advice(512, None, owners=2, inverse_period=10)
    assert "isn't known yet" in sentence and "data.micro_batches = 2" in sentence


@pytest.mark.parametrize(
    ("batch", "words"), [(100, "more ranks pay"), (600, "at twice the cost of each."), (4000, "Past it")]
)
def test_the_advice_follows_the_batch(batch: int, words: str) -> None:
    sentences = batch_advice(batch, 1000.0, owners=2, inverse_period=10)
    assert "1,000 examples" in sentences[0]
    assert f"{gain(batch, 1000.0):.0%}" in sentences[0]
    assert words in sentences[1]
    assert (len(sentences) > 2) == (batch > 1000)


def test_past_the_critical_batch_there_is_something_better_to_do() -> None:
    _, past, *instead = batch_advice(4000, 1000.0, owners=2, inverse_period=10)
    assert "saves only 10% of the steps" in past  # (1 + 1/8) / (1 + 1/4)
    assert [each.partition(" (")[0] for each in instead][0] == "- more owners than 2"
    assert "inverse_period than 10" in instead[1]
    assert instead[2] == "- a smaller batch: 1,000 examples take about 1.6 times the steps, each 4.0 times cheaper."
    assert "closer to the full curvature" in batch_advice(4000, 1000.0, owners=2, inverse_period=1)[3]
    alone = batch_advice(4000, 1000.0, owners=0, inverse_period=10)
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
    (sentence,) = owner_advice(owners, {1: 90, 2: 70, 3: 58, 4: 53}, bound, inverse_period=50, delay=4)
    assert words in sentence

"""Real architectures with default arguments: what is covered is measured, and it trains no worse than SGD."""

import re
from pathlib import Path

import pytest

from benchmarks.architectures import ARCHITECTURES
from benchmarks.real_models import BEGIN, END, Training, described, sgd_losses, train_with_kfdist, train_with_sgd

SHORT = ("mobilenet_v3_small", "GPT2LMHeadModel", "MixtralForCausalLM", "LSTM")
"""A small one of each kind: batch norm and depthwise convolutions with squeeze and excitation; a head tied to the
embedding and `Conv1D`; experts; cells."""

PAGE = (Path(__file__).parents[2] / "docs" / "coverage.md").read_text(encoding="utf-8")


def table() -> dict[str, list[str]]:
    """Returns the cells of the page's rows, by model."""
    rows = re.findall(r"^\| (.+) \|$", PAGE.split(BEGIN)[1].split(END)[0], re.MULTILINE)
    return {cells[0]: cells for cells in (row.split(" | ") for row in rows[1:])}


def check_coverage(name: str, ours: Training) -> None:
    """Holds what was covered to the aim and to the page, and what wasn't measured to the warning about it."""
    assert ours.share >= ARCHITECTURES[name].least_share, ours.left_out
    assert bool(ours.unmeasured) == any("not all their uses were measured" in text for text in ours.said)
    assert table()[name][:5] == [name, *described(ours)], "python -m benchmarks.real_models writes the page anew"


def test_the_page_has_every_model() -> None:
    assert list(table()) == list(ARCHITECTURES)


@pytest.mark.parametrize("name", SHORT)
def test_three_steps_go_further_than_sgds_from_the_same_start(name: str) -> None:
    ours = train_with_kfdist(ARCHITECTURES[name], steps=3)
    check_coverage(name, ours)
    assert ours.losses[-1] < train_with_sgd(ARCHITECTURES[name], seed=0, steps=3).losses[-1]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_six_steps_end_no_higher_than_sgds(name: str) -> None:
    """At the same learning rate: at most the mean over five seeds, and twice their spread."""
    ours = train_with_kfdist(ARCHITECTURES[name])
    check_coverage(name, ours)
    mean, spread = sgd_losses(ARCHITECTURES[name])
    assert ours.losses[-1] <= mean + 2 * spread

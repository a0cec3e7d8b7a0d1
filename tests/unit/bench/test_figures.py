"""The tables in README.md and docs/performance.md are those of the committed results."""

from typing import Any

import pytest

from benchmarks import figures
from benchmarks.figures import DESCRIBED, PAGES, five, soonest


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_show_the_committed_results(page):
    text = page.read_text(encoding="utf-8")
    assert figures.filled(text) == text, "run python -m benchmarks.figures"


def test_every_result_has_its_place():
    shown = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert all(f"<!-- figures: {name} -->\n" in shown for name in (*DESCRIBED, "five"))


NONE: dict[str, Any] = dict.fromkeys(DESCRIBED)


def test_without_results_there_is_no_table():
    assert five(NONE) == "Not measured yet.\n"


def test_the_figures_are_those_of_the_results():
    shown = five(
        {
            **NONE,
            "overhead": {"mean_ratio_to_sgd": 1.984, "p99_over_p50": {"kfdist": 1.25, "sgd": 1.31}},
            "stall": {"p50_ratio": 1.001, "p99_ratio": 0.99, "config": {"slowdown": 10, "workload": "an MLP"}},
            "traffic": {"by_method": {"kfac": {"kfdist_over_gradient": 0.0376}}, "config": {"model": "resnet50"}},
            "inversion": {
                "times_faster_than_eigh": {"1024": {"rs-kfac": 2.0}, "4608": {"rs-kfac": 16.4}},
                "by_size": {"rs-kfac": [{"d": 1024, "error": 0.5}, {"d": 4608, "error": 0.026}]},
            },
        }
    )
    for words in ("1.98 x SGD's; p99/p50 1.25, SGD's 1.31", "p50 1.001 x", "3.8% (kfac)", "16 times", "2.6%"):
        assert words in shown
    assert shown.count("\n") == 6


def test_the_soonest_of_both_sides_is_told():
    def cell(rival: str, seconds: float | None) -> dict[str, Any]:
        known = {"rate": 0.1, "seed": 0, "one_core": False, "steps": 1, "last": 0.5, "milliseconds_a_step": 1.0}
        return {"task": "digits-cnn", "rival": rival, "seconds": seconds, **known}

    cells = [cell("sgd", 3.0), cell("adamw", 2.0), cell("rs-kfac", None)]
    content = {"cells": {str(number): each for number, each in enumerate(cells)}}
    assert soonest(content, "digits-cnn") == "kfdist's best: rs-kfac never; best of the others: adamw 2.0 s"
    assert soonest(content, "digits-autoencoder") is None

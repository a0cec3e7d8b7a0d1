"""The tables in README.md and docs/performance.md are those of the committed results."""

from typing import Any

import pytest

from benchmarks import figures
from benchmarks.figures import DESCRIBED, PAGES, five, said, worth


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_show_the_committed_results(page):
    text = page.read_text(encoding="utf-8")
    assert figures.filled(text) == text, "run python -m benchmarks.figures"


def test_every_result_has_its_place():
    shown = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert all(f"<!-- figures: {name} -->\n" in shown for name in (*DESCRIBED, "five", "worth"))


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


def _cell(rival: str, seconds: float | None, last: float = 0.5, *, seed: int = 1, rate: float = 0.1) -> dict[str, Any]:
    known = {"rate": rate, "seed": seed, "apart": False, "steps": 40, "milliseconds_a_step": 1.0, "limit": 12.0}
    return {"task": "digits-cnn", "rival": rival, "seconds": seconds, "last": last, **known}


def _target(*cells: dict[str, Any]) -> dict[str, Any]:
    tuned = [{**each, "seed": 0} for each in cells]
    goals = {
        task: {"title": task, "metric": "loss", "goal": goal}
        for task, goal in (("digits-cnn", 0.03), ("mnist-autoencoder", None))
    }
    every = dict(enumerate([*cells, *tuned]))
    return {"config": {"goals": goals}, "cells": every}


def test_the_first_table_tells_when_both_sides_reached_a_target():
    cells = [_cell("sgd", 1.5), _cell("adamw", 2.04), _cell("rs-kfac", 1.25), _cell("optimizer", None, last=0.046)]
    rows = worth(_target(*cells)).splitlines()
    assert len(rows) == 3
    title, default, adamw, ours, best = (cell.strip() for cell in rows[2].strip("|").split("|"))
    assert title == "digits-cnn: loss 0.03"
    assert (default, adamw) == ("0.046 after 12 s", "2 s, 40 steps")
    assert (ours, best) == ("rs-kfac: 1.2 s, 40 steps", "sgd: 1.5 s, 40 steps")


@pytest.mark.parametrize(("seconds", "words"), [(132.4, "132 s"), (12.04, "12 s"), (9.96, "10 s"), (1.234, "1.2 s")])
def test_seconds_are_plain_numbers(seconds: float, words: str):
    found = {**_cell("adamw", seconds), "tuned": False}
    assert said(found) == f"{words}, 40 steps"
    assert said({**found, "tuned": True}) == f"{words}, 40 steps (tuning's seed alone)"


def test_a_rival_without_reported_seeds_is_marked():
    cells = [_cell("optimizer", 1.5), _cell("adamw", 2.04), _cell("sgd", 1.0, seed=0)]
    assert "| sgd: 1 s, 40 steps (tuning's seed alone) |" in worth(_target(*cells))


def test_where_nobody_reached_a_target_the_closest_is_named():
    cells = [_cell("adamw", None, last=0.2), _cell("sgd", None, last=0.1), _cell("optimizer", None, last=0.05)]
    assert "| optimizer: 0.05 after 12 s | sgd: 0.1 after 12 s |" in worth(_target(*cells))


@pytest.mark.parametrize("cells", [[], [_cell("adamw", 1.0)], [_cell("optimizer", 1.0), _cell("rs-kfac", 1.0)]])
def test_a_task_without_both_sides_has_no_row(cells: list[dict[str, Any]]):
    assert worth(_target(*cells)) == worth(None) == "Not measured yet.\n"

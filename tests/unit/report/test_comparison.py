import json
import re
import shutil
from pathlib import Path

import pytest

from kfdist.errors import ConfigError
from kfdist.report.comparison import MOST_RUNS, write_comparison
from tests.unit.report.test_page import Page


def test_runs_are_told_apart_by_curves_results_and_configuration(finished: Path, plain: Path, tmp_path: Path) -> None:
    page = Page(write_comparison([finished, plain], tmp_path / "comparison.html"))
    assert list(page.chapters) == [
        "Loss and accuracy",
        "Results",
        "Staleness of the inverses",
        "Differences in configuration and versions",
    ]
    # Training by step and by seconds; validation too, as one of them was evaluated twice.
    assert page.chapters["Loss and accuracy"]["figure"] == 8
    assert re.search(r"Loss in training by seconds trained; at the end whole \S+ and digits", page.text)
    words = page.text.split()
    losses = [json.loads((run / "summary.json").read_text())["metrics"]["test_loss"] for run in (finished, plain)]
    assert [f"{loss:.4g}" in words for loss in losses] == [True, True]
    assert "preconditioner.method" in words and "run.seed" not in words
    assert "Without inverses: digits." in page.text


def test_runs_of_one_name_are_told_apart_by_their_directories(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "copy")
    page = Page(write_comparison([finished, tmp_path / "copy"], tmp_path / "comparison.html"))
    assert "Runs run and copy" in page.text
    assert "There are none, but for names and places." in page.text


def test_a_run_is_not_compared_with_itself_and_not_with_too_many(finished: Path) -> None:
    with pytest.raises(ConfigError, match="the same run is given twice"):
        write_comparison([finished, finished / ".." / finished.name])
    with pytest.raises(ConfigError, match=f"compare at most {MOST_RUNS}"):
        write_comparison([finished] * (MOST_RUNS + 1))


def test_the_best_accuracy_says_whose_weights_it_is_of(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "averaged")
    averaged = {"event": "evaluation", "time": 4e9, "step": 1, "weights": "averaged", "test_accuracy": 1.5}
    with (tmp_path / "averaged" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(averaged) + "\n")
    page = Page(write_comparison([finished, tmp_path / "averaged"], tmp_path / "comparison.html"))
    words = " ".join(page.text.split())
    assert "best averaged test accuracy – 150.00 %" in words
    assert "150.00 %" not in words.replace("best averaged test accuracy – 150.00 %", "")

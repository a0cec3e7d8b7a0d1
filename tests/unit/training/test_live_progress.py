"""Training's progress bar: one line, whole numbers, at any width."""

import io
import os
import re
from dataclasses import replace

import pytest

from kfdist.training.live_progress import LiveProgress
from kfdist.training.progress import ProgressLine
from kfdist.training.reporting import make_progress

LINE = ProgressLine(
    step=200,
    total_steps=120_000,
    loss=0.25,
    metrics={"accuracy": 0.875, "recall": 0.5},
    staleness=14,
    steps_per_second=31.5,
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm")
    return Terminal()


def drawn(terminal: Terminal, line: ProgressLine, width: int, monkeypatch: pytest.MonkeyPatch) -> str:
    """Returns the line as it stands when the bar is closed."""
    monkeypatch.setenv("COLUMNS", str(width))
    progress = make_progress(worker_rank=0, total_steps=line.total_steps, stream=terminal)
    assert isinstance(progress, LiveProgress)
    progress.show(line)
    progress.close()
    return frames(terminal)[-1]


def frames(terminal: Terminal) -> list[str]:
    """Returns what was drawn over each other, without colours."""
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue())
    return [frame for frame in map(str.strip, text.split("\r")) if frame]


@pytest.mark.parametrize("width", [30, 40, 60, 80, 100, 160])
@pytest.mark.parametrize("total", [120, 120_000])
def test_it_fits_and_cuts_no_number(terminal, monkeypatch, width, total):
    line = drawn(terminal, replace(LINE, step=60, total_steps=total), width, monkeypatch)
    assert len(line) < width
    assert f"60/{total}" in line
    parts = [part.strip(" ━╸╺") for part in re.split(r" {2,}", line)]
    known = (
        "step",
        r"(step )?60/\d+",
        r"loss 0\.2500",
        r"accuracy 87\.50%",
        r"recall 0\.5000",
        "staleness 14",
        r"31\.5 steps/s",
    )
    known += (r"[\d:]+( days?, [\d:]+)? (left|so far)", "")
    assert [part for part in parts if not any(re.fullmatch(each, part) for each in known)] == []


def test_at_80_columns_it_shows_loss_accuracy_staleness_time_and_a_bar(terminal, monkeypatch):
    line = drawn(terminal, replace(LINE, total_steps=1200), 80, monkeypatch)
    assert all(word in line for word in ("loss 0.2500", "accuracy 87.50%", "staleness 14", "left"))
    assert "━" in drawn(terminal, replace(LINE, step=20, total_steps=120), 80, monkeypatch)


def test_what_is_said_stands_above_it_whole(terminal, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    progress = make_progress(worker_rank=0, total_steps=120, stream=terminal)
    said = "an [event] happened that takes more than forty columns to tell"
    progress.say(said)
    progress.show(replace(LINE, loss=float("nan"), staleness=None, metrics={}))
    progress.close()
    assert said in terminal.getvalue(), "not wrapped: the terminal does that, and a copy has it whole"
    assert "nan" in terminal.getvalue()


def test_it_follows_a_resized_window(terminal, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.delenv("LINES", raising=False)
    sizes = {"width": 120}
    monkeypatch.setattr(os, "get_terminal_size", lambda *_: os.terminal_size((sizes["width"], 24)))
    progress = make_progress(worker_rank=0, total_steps=120, stream=terminal)
    progress.show(replace(LINE, total_steps=120, step=20))
    sizes["width"] = 50
    progress.show(replace(LINE, total_steps=120, step=30))
    progress.close()
    (wide,) = {frame for frame in frames(terminal) if "20/120" in frame}
    (narrow,) = {frame for frame in frames(terminal) if "30/120" in frame}
    assert 80 < len(wide) < 120
    assert len(narrow) < 50


def test_a_run_without_an_end_in_sight_is_shown(terminal, monkeypatch):
    line = drawn(terminal, replace(LINE, total_steps=10**24, steps_per_second=1e-3), 160, monkeypatch)
    assert "11574 days, 1:46:40 left" in line

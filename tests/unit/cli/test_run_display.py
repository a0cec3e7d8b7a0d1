"""Tables of runs and events on terminals of any width."""

import io
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from kfdist.cli.run_display import events_table, print_run, runs_table
from kfdist.control.client import EventView, RunView
from kfdist.control.control_records import RunState
from kfdist.types import MetricSample

HEADS = ["RUN", "STATE", "STEP", "START", "RANKS", "OWNERS", "LOSS", "CREATED", "DIRECTORY"]
NOW = datetime(2026, 11, 29, 9, 17, 15, tzinfo=UTC)


def run(**told: Any) -> RunView:
    same = {"revision": 7, "epoch": 2, "live_workers": 2, "live_owners": 2, "created": NOW, "world_size": 2}
    settings = {"settings": {}, "settings_revision": 0, "obeyed_revision": 0, "obeyed_step": 0, "changed": ()}
    return RunView(state=RunState.RUNNING, gauges={"kfdist_loss": 2.125e-05}, **{**same, **settings, **told})


def lines(table: Table, width: int) -> list[str]:
    console = Console(file=(file := io.StringIO()), width=width, color_system=None)
    console.print(table)
    return [line.rstrip() for line in file.getvalue().splitlines()]


@pytest.mark.parametrize(
    ("width", "heads"),
    [
        (30, HEADS[:3]),
        (40, [*HEADS[:3], "LOSS"]),
        (54, [*HEADS[:3], *HEADS[4:7]]),
        (80, [*HEADS[:3], *HEADS[4:7], "DIRECTORY"]),
        (160, HEADS),
    ],
)
def test_a_table_of_runs_loses_columns_and_the_middle_of_names_but_no_digit(width: int, heads: Sequence[str]) -> None:
    directory = "/data/experiments/second-order/digits/run-17"
    short = run(name="beta", step=199_999, total_steps=200_000, directory=directory)
    drawn = lines(runs_table([short], width), width)
    assert drawn[0].split() == heads and max(map(len, drawn)) <= width
    assert "199999/200000" in drawn[1] and ("LOSS" in heads) == ("2.125e-05" in drawn[1])
    assert ("DIRECTORY" in heads) == drawn[1].endswith("run-17")
    named = run(name="a-run-whose-name-has-many-words", step=1, total_steps=2, directory="")
    assert max(map(len, lines(runs_table([named], width), width))) <= width


@pytest.mark.parametrize("width", [30, 40, 60, 80, 160])
def test_events_are_whole_at_any_width(width: int) -> None:
    text = "revision 12 (refresh of all blocks), agreed on by all ranks at step 197"
    event = EventView(event_id=1234, time=NOW, kind="refresh_requested", text=text)
    drawn = lines(events_table([event], width), width)
    assert max(map(len, drawn)) <= width
    words = " ".join(drawn).split()
    assert [word for word in ["1234", "refresh_requested", *text.split()] if word not in words] == []
    assert ("KIND" in drawn[0]) == (width >= 80)


def test_a_terminal_without_room_for_all_blocks_is_told_how_to_see_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = [MetricSample(name="kfdist_staleness_steps", value=1, labels={"block": f"b{n}"}) for n in range(45)]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    print_run(run(name="mine", step=1, total_steps=2, directory=""), [], samples, as_json=False)
    assert "and 5 more; `kfdist status mine | less` shows all" in capsys.readouterr().out

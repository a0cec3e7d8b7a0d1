"""What is read of a run's directory."""

import json
from pathlib import Path
from typing import Any

from kfdist.report.recorded import Recorded


def start(step: int) -> dict[str, Any]:
    return {"event": "start", "time": 1.0, "step": step, "blocks": [], "methods": []}


def window(step: int, *, steps: int) -> dict[str, Any]:
    """A window at whose end its start has made so many steps."""
    empty: dict[str, Any] = {"phases": {}, "inversions": {}, "diagnostics": {}, "staleness": []}
    return {"event": "window", "time": 2.0, "step": step, "totals": {"steps": steps}, **empty}


def recorded(directory: Path, *lines: dict[str, Any]) -> Recorded:
    (directory / "config.toml").write_text("")
    (directory / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Recorded.of(directory)


def test_each_start_has_its_own_totals_however_few_steps_an_earlier_one_made(tmp_path: Path) -> None:
    early = (start(0), window(3, steps=3))
    later = (start(3), window(10, steps=7), window(20, steps=17))
    run = recorded(tmp_path, *early, start(3), *later, start(20), window(21, steps=1))
    assert [totals["steps"] for totals in run.by_start()] == [3, 17, 1]
    assert [line["step"] for line in run.windows] == [3, 10, 20, 21]


def test_windows_of_steps_that_were_made_again_count_nothing(tmp_path: Path) -> None:
    run = recorded(tmp_path, start(0), window(10, steps=10), window(20, steps=20), start(10), window(20, steps=10))
    assert [totals["steps"] for totals in run.by_start()] == [10, 10]

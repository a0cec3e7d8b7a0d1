import json
import shutil
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from kfdist.control import run_rules
from kfdist.control.store import Batch, RunUpdate, Store
from kfdist.errors import ConfigError
from kfdist.report.inversion_chapters import staleness
from kfdist.report.page import status, write_report
from kfdist.report.recorded import Recorded
from kfdist.report.training_chapters import advice
from kfdist.training.history import window_length
from tests.support.recorded import long_history, record

CHAPTERS = [
    "Loss and accuracy",
    "Staleness of the inverses",
    "Step time by phase",
    "Inversion times",
    "Bytes by purpose",
    "Spectrum of the factors at checkpoints",
    "Diagnostics of the inversions",
    "Length of steps",
    "Gradient noise scale",
    "Events",
    "Configuration, versions and hardware",
]
_VOID = {"meta", "link", "br", "img", "hr", "input", "wbr"}


class Page(HTMLParser):
    """A page by chapters; well-formed, and asking nobody for anything."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.chapters: dict[str, dict[str, int]] = {}
        self.text = ""
        self._heading = False
        self.feed(file.read_text(encoding="utf-8"))
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in _VOID:
            self.open.append(tag)
        given = dict(attrs)
        self.ids += [given["id"] or ""] if "id" in given else []
        self.links += [
            value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "action")
        ]
        if tag == "wbr":
            self.text = self.text.removesuffix(" ")
        self._heading = tag == "h2"
        if self.chapters and tag in ("figure", "table", "details"):
            counts = next(reversed(self.chapters.values()))
            counts[tag] = counts.get(tag, 0) + 1
        assert tag != "script"
        if given.get("role") == "img":
            assert given["aria-label"]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag
        self._heading = False

    def handle_data(self, data: str) -> None:
        if self._heading:
            self.chapters[data] = {}
        if "style" not in self.open:
            self.text += f"{data} "


def page_of(directory: Path, tmp_path: Path) -> Page:
    return Page(write_report(directory, tmp_path / "report.html"))


def lines_of(directory: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / name).read_text().splitlines()]


def write_lines(directory: Path, name: str, lines: list[dict[str, Any]]) -> None:
    (directory / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def page(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Page:
    return page_of(finished, tmp_path_factory.mktemp("page"))


def test_a_finished_run_has_every_chapter_with_figures_and_numbers(finished: Path, page: Page) -> None:
    assert list(page.chapters) == CHAPTERS
    figures = {title: counts.get("figure", 0) for title, counts in page.chapters.items()}
    assert list(figures.values()) == [2, 1, 2, 1, 1, 1, 3, 2, 1, 0, 0]
    assert all(counts.get("table") for title, counts in page.chapters.items() if title != "Gradient noise scale")
    summary = json.loads((finished / "summary.json").read_text())
    assert f"{100 * summary['metrics']['test_accuracy']:.2f} %" in page.text
    assert "The run is finished: 40 steps." in page.text
    assert "The critical batch is about" in page.text
    assert (
        "device of rank 0" in page.text
        and "preconditioner.damping" in page.text
        and summary["versions"]["torch"] in page.text
    )


def test_a_page_stands_by_itself(page: Page) -> None:
    assert [link for link in page.links if not link.startswith(("#", "data:"))] == []
    assert len(set(page.ids)) == len(page.ids)
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)


def test_each_block_has_its_methods_own_period(tmp_path: Path) -> None:
    """In the history, in the table, and in what is advised past the critical batch."""
    dense = 'dense = "ekfac-adam", dense_settings = { basis_period = 20 }'
    directory = record(
        tmp_path / "run",
        "preconditioner.method=by-width",
        f'preconditioner.settings={{ {dense}, wide = "rs-kfac", eigen = 20 }}',  # the last of three layers is narrower
        "preconditioner.factor_period=10",
        "preconditioner.inverse_period=100",
        "optimizer.name=kfdist",
        "run.steps=3",
    )
    history = lines_of(directory, "history.jsonl")
    start, windows = history[0], [line for line in history if line["event"] == "window"]
    assert set(zip(start["methods"], windows[-1]["periods"], strict=True)) == {("ekfac-adam", 20), ("rs-kfac", 100)}
    recorded = Recorded.of(directory)
    [table] = staleness(recorded).tables
    assert {row[1]: row[2] for row in table.rows} == {"ekfac-adam": "20", "rs-kfac": "100"}
    said = " ".join(advice(recorded, 10.0, 1000))
    assert "a shorter preconditioner.settings.dense_settings.basis_period than 20" in said


def test_without_a_preconditioner_it_says_so(plain: Path, tmp_path: Path) -> None:
    page = page_of(plain, tmp_path)
    assert page.text.count("The run has no preconditioner: nothing was inverted.") == 4
    assert page.chapters["Staleness of the inverses"] == {}
    assert page.chapters["Step time by phase"]["figure"] == 2


@pytest.mark.parametrize(
    ("summary", "words"),
    [
        ({"status": "finished", "steps": 40}, "The run is finished: 40 steps."),
        (
            {"status": "finished", "steps": 40, "unsaved_steps": 10},
            "The run is finished: 40 steps. But the last 10 steps are in no checkpoint; the same command makes them "
            "anew from step 30.",
        ),
        (
            {"status": "stopped", "steps": 12, "stop_reason": "a signal"},
            "The run stopped at step 12: a signal. The same command begins it anew.",
        ),
        (
            {"status": "failed", "error": "loss is nan.", "ended": "rank 1 was killed"},
            "The run failed: rank 1 was killed. Rank 0: loss is nan. The last step known is 7. The same "
            "command begins it anew.",
        ),
        (
            {"status": "running", "ended": "rank 0 hung"},
            "The run's last start was cut off: rank 0 hung. The last step known is 7. The same command begins it anew.",
        ),
    ],
)
def test_the_head_says_how_a_run_ended(summary: dict[str, Any], words: str) -> None:
    assert status(Recorded(directory=Path("run"), config={}, summary=summary, steps=[{"step": 7}])) == words


def test_killed_in_the_first_step(finished: Path, tmp_path: Path) -> None:
    killed = tmp_path / "killed"
    shutil.copytree(finished, killed)
    shutil.rmtree(killed / "checkpoints")
    for name in ("metrics.jsonl", "history.jsonl"):
        write_lines(killed, name, lines_of(killed, name)[:1])
    (killed / "summary.json").write_text('{"status": "running", "run": "whole", "start": 1}')
    page = page_of(killed, tmp_path)
    assert "ended without saying how" in page.text
    assert "No log period (1 step) was completed" in page.text
    assert "no checkpoint was written yet" in page.text
    assert sum(counts.get("figure", 0) for counts in page.chapters.values()) == 0


def test_a_resumed_run_shows_no_step_twice(tmp_path: Path) -> None:
    run = record(tmp_path / "run", "run.steps=12")
    # As if it had been killed: steps after its checkpoint, which the next start makes again.
    for name in ("metrics.jsonl", "history.jsonl"):
        last = [line for line in lines_of(run, name) if line["event"] in ("step", "window")][-1]
        with (run / name).open("a") as file:
            file.write(json.dumps({**last, "step": 19, "loss": 1e6}) + "\n" + '{"event": "st')
    record(run, "run.steps=20")
    page = page_of(run, tmp_path)
    assert "The run was resumed at step 12; dotted lines mark it." in page.text
    assert "1e+06" not in page.text
    assert "1 line is left out of metrics.jsonl" in page.text


def test_a_run_that_goes_on(finished: Path, tmp_path: Path) -> None:
    from kfdist.config import load_config
    from kfdist.training.run_directory import RunDirectory

    shutil.copytree(finished, tmp_path / "run")
    changes = [f"run.dir={tmp_path / 'run'}", "run.steps=80"]
    held = RunDirectory.open(load_config(tmp_path / "run" / "config.toml", overrides=changes))
    try:
        assert "The run goes on: step 40 was done" in page_of(tmp_path / "run", tmp_path).text
    finally:
        held.close()


def test_what_is_damaged_or_missing_is_said(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    names = ["metrics.jsonl", "history.jsonl", "summary.json", "config.toml"]
    for name in (*names, "control.sqlite"):
        (tmp_path / "run" / name).write_bytes(b'{"\xff')
    text = page_of(tmp_path / "run", tmp_path).text
    assert [name for name in (*names, "control.sqlite") if name not in text] == []
    for name in names[:3]:
        (tmp_path / "run" / name).unlink()
    text = page_of(tmp_path / "run", tmp_path).text
    assert [name for name in names[:3] if f"There is no {name}" not in text] == []


def test_events_of_the_controller_are_read_and_nothing_is_left_beside_them(plain: Path, tmp_path: Path) -> None:
    shutil.copytree(plain, tmp_path / "run")
    store = Store(tmp_path / "run" / "control.sqlite")
    made = run_rules.created(None, name="digits", directory="", total_steps=5, now_ns=1)
    store.commit(Batch(runs=(RunUpdate(record=made.record, message=b"", events=made.events),)))
    for ends in (False, True):  # the controller
        if ends:
            store.close()
        text = page_of(tmp_path / "run", tmp_path).text
        assert "controller: created" in text and "run digits made known" in text
    left = sorted(path.name for path in (tmp_path / "run").glob("control.sqlite*"))
    assert left == ["control.sqlite", "control.sqlite.lock"]


def test_what_is_no_run_directory_is_refused(tmp_path: Path) -> None:
    for directory, words in ((tmp_path, "has no config.toml"), (tmp_path / "absent", "isn't a directory")):
        with pytest.raises(ConfigError, match=words):
            write_report(directory)


def test_a_run_of_a_million_steps_has_a_small_page(finished: Path, tmp_path: Path) -> None:
    run, steps = tmp_path / "run", 1_000_000
    shutil.copytree(finished, run)
    lines = lines_of(run, "history.jsonl")
    lines[0]["blocks"][0] = "<script>alert(1)</script>"  # a name is text, whatever it says
    windows = long_history(lines, steps=steps, length=lambda step: window_length(step, 1))
    write_lines(run, "history.jsonl", windows)
    start, *_ = lines_of(run, "metrics.jsonl")
    line = next(line for line in lines_of(run, "metrics.jsonl") if line["event"] == "step")
    write_lines(run, "metrics.jsonl", [start, *({**line, "step": step} for step in range(100, steps + 1, 100))])
    begun = time.process_time()
    written = write_report(run)
    assert time.process_time() - begun < 20  # two, on a machine of its own
    assert written.stat().st_size < 2_000_000
    assert (run / "history.jsonl").stat().st_size < 20_000_000
    assert "<script>alert(1)</script>" in Page(written).text

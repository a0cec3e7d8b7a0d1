"""`kfdist watch`: a screen that is redrawn in place on a terminal, a line for each change elsewhere."""

import json
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from kfdist.cli.find_runs import look_around
from kfdist.cli.run_display import print_target, run_line, runs_table
from kfdist.cli.run_target import Target
from kfdist.cli.watch_screen import FRAME_SECONDS, HINT, RunScreen, away_note
from kfdist.control.client import RunView
from kfdist.control.control_records import RunState
from kfdist.errors import EnvironmentFault

AWAY_SECONDS = 600.0
"""How long a watch waits for a controller that was there."""

_ORPHANED_SECONDS = 5.0
"""How long it waits where nobody trains in the run's directory any more."""


def watch(target: Target, *, from_revision: int, as_json: bool) -> None:
    """Shows a run and its changes until it has ended.

    Raises:
        ConfigError, EnvironmentFault: As for `ControlClient.watch`.
        KeyboardInterrupt: The reader has had enough.
    """
    if target.controller is None and not (target.files and target.files.trainer):
        print_target(target, as_json=as_json)
        return
    console = Console()
    try:
        if _has_screen(console) and not as_json:
            _show(target, from_revision, console)
        else:
            _print_changes(target, from_revision, as_json=as_json)
    except EnvironmentFault as fault:
        if target.files is None or target.files.again().trainer:
            raise
        print(f"kfdist: {fault}", file=sys.stderr)
        print_target(replace(target, controller=None, files=target.files.again()), as_json=as_json)


def watch_all(address: str | None, *, as_json: bool) -> None:
    """Shows all runs of this machine, or of one controller, until none of them goes on; a line each, at each change.

    Raises:
        ConfigError: As for `look_around`.
        EnvironmentFault: The one controller that was named isn't there, or went away and stays away.
        KeyboardInterrupt: The reader has had enough.
    """
    console = Console()
    on_screen = _has_screen(console) and not as_json
    known: dict[tuple[str, str], str] = {}
    survey, heard, silent = look_around(address), time.monotonic(), ()
    with Live(console=console, screen=True, auto_refresh=False) if on_screen else nullcontext() as live:
        while True:
            runs = [found.view for found in survey.runs]
            if live is not None:
                notes = [Text(note, style="yellow") for note in survey.silent] or [
                    Text(f"one run: kfdist watch RUN; {HINT}")
                ]
                live.update(Group(runs_table(runs, console.width), Text(), *notes), refresh=True)
            else:
                _print_changed(runs, known, as_json=as_json)
                for fault in [each for each in survey.silent if each not in silent]:
                    print(f"kfdist: {fault}", file=sys.stderr, flush=True)
                silent = tuple(survey.silent)
            if not survey.going():
                break
            time.sleep(FRAME_SECONDS)
            try:
                survey, heard = look_around(address), time.monotonic()
            except EnvironmentFault as fault:  # of the one that was named, as while it is started again
                if time.monotonic() - heard > AWAY_SECONDS:
                    raise
                survey = replace(survey, silent=[str(fault)])
    if on_screen:
        console.print(runs_table(runs, console.width) if runs else survey.nothing())


def _print_changed(runs: Sequence[RunView], known: dict[tuple[str, str], str], *, as_json: bool) -> None:
    for run in runs:
        line = json.dumps(run.to_json()) if as_json else run_line(run)
        if known.get((run.name, run.directory)) != line:
            known[run.name, run.directory] = line
            print(line, flush=True)


def _has_screen(console: Console) -> bool:
    return console.is_terminal and not console.is_dumb_terminal


def _changes(target: Target, from_revision: int, on_away: Callable[[float], None]) -> Iterator[RunView]:
    """Yields a run now and at every change, the last time when it has ended."""
    if target.controller is None:
        assert target.files is not None
        yield from target.files.follow()
        return

    def away(seconds: float) -> None:
        on_away(seconds)
        if seconds > _ORPHANED_SECONDS and target.files is not None and not target.files.again().trainer:
            raise EnvironmentFault(f"the controller of run {target.name!r} is gone, and nobody trains it any more")

    with target.client() as client:
        seen = client.watch(target.name, from_revision=from_revision, away_seconds=AWAY_SECONDS, on_away=away)
        for run in seen:
            yield target.located(run)
            if run.state.ended:
                return


def _print_changes(target: Target, from_revision: int, *, as_json: bool) -> None:
    last, told = "", False

    def tell(seconds: float) -> None:
        nonlocal told
        if bool(seconds) is not told:
            told = bool(seconds)
            print(
                f"kfdist: {away_note(target) if told else 'the controller answers again'}", file=sys.stderr, flush=True
            )

    for run in _changes(target, from_revision, tell):
        if (line := json.dumps(run.to_json()) if as_json else run_line(run)) != last:
            print(line, flush=True)
            last = line


def _what_went_wrong(target: Target, state: RunState | None) -> str:
    """Says why a run has failed, as far as its files tell, or where that is found; nothing of one that hasn't."""
    if state not in (RunState.FAILED, RunState.LOST):
        return ""
    told = target.files.again().remarks().get("error") if target.files is not None else None
    return f"{told}" if told else f"`kfdist events {target.name}` says more"


def _show(target: Target, from_revision: int, console: Console) -> None:
    screen = RunScreen(target)
    news: queue.Queue[RunView | Exception | None] = queue.Queue()

    def listen() -> None:
        try:
            for run in _changes(target, from_revision, screen.is_away):
                news.put(run)
            news.put(None)
        except Exception as error:  # whatever it is: the screen would wait for news for ever
            news.put(error)

    threading.Thread(target=listen, name="kfdist-watch", daemon=True).start()
    note = "the run goes on; the same command shows it again"
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while screen.take(news):
                screen.measure()
                live.update(screen.picture() or Text(f"waiting for news of run {target.name}"), refresh=True)
        note = _what_went_wrong(target, screen.state)
    finally:
        screen.measure()
        if (last := screen.picture(note)) is not None:
            console.print(last)

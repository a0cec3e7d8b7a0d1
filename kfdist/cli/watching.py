"""`kfdist watch`: a screen that is redrawn in place on a terminal, a line for each change elsewhere."""

import json
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from kfdist.cli.find_runs import Target, look_around
from kfdist.cli.live_view import RunPicture
from kfdist.cli.run_display import print_target, run_line, runs_table
from kfdist.control.client import ControlClient, RunView
from kfdist.errors import EnvironmentFault, KfdistError
from kfdist.types import MetricSample

AWAY_SECONDS = 600.0
"""How long a watch waits for a controller that was there."""

_ORPHANED_SECONDS = 5.0
"""How long it waits where nobody trains in the run's directory any more."""

_FRAME_SECONDS = 1.0
_RATE_SECONDS = 30.0
_KEPT_LOSSES = 5000
_HINT = "Ctrl-C ends the watch, not the run"


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
        ConfigError, EnvironmentFault: As for `look_around`.
        KeyboardInterrupt: The reader has had enough.
    """
    console = Console()
    on_screen = _has_screen(console) and not as_json
    known: dict[tuple[str, str], str] = {}
    survey = look_around(address)
    with Live(console=console, screen=True, auto_refresh=False) if on_screen else nullcontext() as live:
        while True:
            runs = [found.view for found in survey.runs]
            if live is not None:
                notes = [Text(note, style="yellow") for note in survey.silent] or [
                    Text(f"one run: kfdist watch RUN; {_HINT}")
                ]
                live.update(Group(runs_table(runs, console.width), Text(), *notes), refresh=True)
            else:
                _print_changed(runs, known, as_json=as_json)
            if not survey.going():
                break
            time.sleep(_FRAME_SECONDS)
            survey = look_around(address)
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
            print(f"kfdist: {_away(target) if told else 'the controller answers again'}", file=sys.stderr, flush=True)

    for run in _changes(target, from_revision, tell):
        if (line := json.dumps(run.to_json()) if as_json else run_line(run)) != last:
            print(line, flush=True)
            last = line


def _show(target: Target, from_revision: int, console: Console) -> None:
    screen = _Screen(target)
    news: queue.Queue[RunView | KfdistError | None] = queue.Queue()

    def listen() -> None:
        try:
            for run in _changes(target, from_revision, screen.is_away):
                news.put(run)
            news.put(None)
        except KfdistError as error:
            news.put(error)

    threading.Thread(target=listen, name="kfdist-watch", daemon=True).start()
    note = "the run goes on; the same command shows it again"
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while screen.take(news):
                screen.measure()
                live.update(screen.picture() or Text(f"waiting for news of run {target.name}"), refresh=True)
        note = ""
    finally:
        screen.measure()
        if (last := screen.picture(note)) is not None:
            console.print(last)


class _Screen:
    """What is known of a run while it is watched; the picture of each frame."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._run: RunView | None = None
        self._losses: deque[float] = deque(target.files.losses() if target.files else (), maxlen=_KEPT_LOSSES)
        self._progress: deque[tuple[float, int]] = deque()
        self._ranks = 0
        self._away = 0.0
        self._client: ControlClient | None = None
        self._samples: Sequence[MetricSample] = ()
        self._owners: Mapping[str, int] = {}

    def is_away(self, seconds: float) -> None:
        """Notes for how long the controller hasn't answered; called by the thread that listens."""
        self._away = seconds

    def take(self, news: "queue.Queue[RunView | KfdistError | None]") -> bool:
        """Takes in what came within a frame's time; says whether more will come.

        Raises:
            KfdistError: What ended the watch.
        """
        ends = time.monotonic() + _FRAME_SECONDS
        with suppress(queue.Empty):
            while (left := ends - time.monotonic()) > 0:
                heard = news.get(timeout=left)
                if heard is None:
                    return False
                if isinstance(heard, KfdistError):
                    raise heard
                first = self._run is None
                self._note(heard)
                if first:  # no need to wait for the first picture
                    return True
        return True

    def measure(self) -> None:
        """Asks for what processes measured and who inverts what; keeps what is known if nobody answers."""
        if self._target.controller is None or self._away:
            return
        try:
            self._client = self._client or self._target.controller.client(seconds=_FRAME_SECONDS)
            self._samples = self._client.samples(self._target.name)
            self._owners = self._client.shares(self._target.name)
        except KfdistError:
            if self._client is not None:
                self._client.close()
            self._client = None

    def picture(self, note: str = _HINT) -> RunPicture | None:
        """Returns the next frame; None if nothing is known yet."""
        if self._run is None:
            return None
        return RunPicture(
            run=self._run,
            samples=self._samples,
            owners=self._owners,
            losses=list(self._losses),
            rate=self._rate(),
            ranks=self._ranks,
            note=f"{_away(self._target)}, for {self._away:.0f} s now" if self._away else note,
        )

    def _note(self, run: RunView) -> None:
        known, self._run = self._run, run
        if known is None or run.epoch != known.epoch:
            self._ranks = 0
            self._progress.clear()
        self._ranks = max(self._ranks, run.live_workers)
        if known is None or run.step != known.step:
            now = time.monotonic()
            self._progress.append((now, run.step))
            while now - self._progress[0][0] > _RATE_SECONDS and len(self._progress) > 2:
                self._progress.popleft()
            if known is not None and (loss := run.gauges.get("kfdist_loss")) is not None:
                self._losses.append(loss)

    def _rate(self) -> float | None:
        if len(self._progress) < 2 or self._run is None or self._run.state.ended:
            return None
        (began, first), (ended, last) = self._progress[0], self._progress[-1]
        return (last - first) / (ended - began) if ended > began and last > first else None


def _away(target: Target) -> str:
    address = target.controller.address if target.controller is not None else ""
    return f"the controller at {address} doesn't answer; trying again"

"""What is known of a run while it is watched on a terminal, as a picture for each frame."""

import queue
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress

from kfdist.cli.live_view import RunPicture
from kfdist.cli.run_target import Target
from kfdist.control.client import ControlClient, OwnerView, RunView
from kfdist.control.control_records import RunState
from kfdist.errors import KfdistError
from kfdist.types import MetricSample

FRAME_SECONDS = 1.0
"""How long a frame stands."""

HINT = "Ctrl-C ends the watch, not the run"

_RATE_SECONDS = 30.0
_KEPT_LOSSES = 5000


def away_note(target: Target) -> str:
    """Says that the run's controller doesn't answer."""
    address = target.controller.address if target.controller is not None else ""
    return f"the controller at {address} doesn't answer; trying again"


class RunScreen:
    """What is known of a run while it is watched; the picture of each frame."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._run: RunView | None = None
        self._losses: deque[float] = deque(target.files.losses() if target.files else (), maxlen=_KEPT_LOSSES)
        self._progress: deque[tuple[float, int]] = deque()
        self._away = 0.0
        self._client: ControlClient | None = None
        self._samples: Sequence[MetricSample] = ()
        self._owners: Sequence[OwnerView] = ()

    @property
    def state(self) -> RunState | None:
        """Where the run stands; None if nothing is known yet."""
        return self._run.state if self._run is not None else None

    def is_away(self, seconds: float) -> None:
        """Notes for how long the controller hasn't answered; called by the thread that listens."""
        self._away = seconds

    def take(self, news: "queue.Queue[RunView | Exception | None]") -> bool:
        """Takes in what came within a frame's time; says whether more will come.

        Raises:
            Exception: What ended the watch.
        """
        ends = time.monotonic() + FRAME_SECONDS
        with suppress(queue.Empty):
            while (left := ends - time.monotonic()) > 0:
                heard = news.get(timeout=left)
                if heard is None:
                    return False
                if isinstance(heard, Exception):
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
            self._client = self._client or self._target.controller.client(seconds=FRAME_SECONDS)
            self._samples = self._client.samples(self._target.name)
            self._owners = self._client.owners(self._target.name)
        except KfdistError:
            if self._client is not None:
                self._client.close()
            self._client = None

    def picture(self, note: str = HINT) -> RunPicture | None:
        """Returns the next frame; None if nothing is known yet."""
        if self._run is None:
            return None
        return RunPicture(
            run=self._run,
            samples=self._samples,
            owners=self._owners,
            losses=list(self._losses),
            rate=self._rate(),
            note=f"{away_note(self._target)}, for {self._away:.0f} s now" if self._away else note,
        )

    def _note(self, run: RunView) -> None:
        known, self._run = self._run, run
        if known is None or run.epoch != known.epoch:
            self._progress.clear()
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

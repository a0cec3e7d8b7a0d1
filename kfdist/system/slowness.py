"""Tells that something takes long while it does: it may hang, and what hangs says nothing by itself."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress


@contextmanager
def told_while_long(tell: Callable[[float], None], *, every_seconds: float) -> Iterator[None]:
    """Calls `tell` with the seconds so far, again and again while the context lasts; from another thread.

    Args:
        tell: What to call.
        every_seconds: When, and how often.
    """
    ended, begun = threading.Event(), time.monotonic()

    def watch() -> None:
        # Signals belong to the thread that works; taken here, they would not wake it from its waits.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while not ended.wait(every_seconds):
            tell(time.monotonic() - begun)

    with suppress(RuntimeError):  # no more threads; it goes on as well without
        threading.Thread(target=watch, name="kfdist-slowness", daemon=True).start()
    try:
        yield
    finally:
        ended.set()

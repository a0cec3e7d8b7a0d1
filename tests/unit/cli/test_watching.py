"""A watch ends when what it listens to does."""

import io
from functools import partial

import pytest
from rich.console import Console

from kfdist.cli import watching
from kfdist.cli.run_target import Endpoint, Target


def test_a_screen_shows_what_ended_the_listening_whatever_it_is(monkeypatch: pytest.MonkeyPatch):
    def changes(*_: object) -> None:
        raise FileNotFoundError("config.toml")

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(watching, "Console", partial(Console, file=io.StringIO(), force_terminal=True))
    monkeypatch.setattr(watching, "_changes", changes)
    target = Target(name="digits", controller=Endpoint(address="127.0.0.1:9"))
    with pytest.raises(FileNotFoundError, match=r"config\.toml"):
        watching.watch(target, from_revision=0, as_json=False)

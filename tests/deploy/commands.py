"""Command lines of the deploy files, read by the parsers that will read them."""

import shlex
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import typer
from torch.distributed.run import get_args_parser  # noqa: TID251  # torchrun's own parser

from kfdist.cli.main import app
from kfdist.config import Config, load_config
from kfdist.errors import ConfigError
from kfdist.system.addresses import split_address

_OTHERS = {"KFDIST_CONTROL_ADDRESS"}
"""Variables of ours that are no field of the configuration."""


@dataclass
class Command:
    """A command line and where it stands.

    Attributes:
        where: To name it.
        words: Its words; what `sh -c` is given counts as lines of words.
        environment: What the container's environment says.
        configs: Texts of configuration files by their path in the container.
        parsed: What torchrun's parser made of it.
        config: What kfdist makes of it.
    """

    where: str
    words: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    configs: Mapping[str, str] = field(default_factory=dict)
    parsed: Any = None
    config: Config | None = None

    def faults(self) -> Iterator[str]:
        """Parses it; yields what is wrong."""
        for name, value in self.environment.items():
            if name.startswith("KFDIST_") and "__" not in name and name not in _OTHERS:
                yield f"{self.where}: {name} is no variable that kfdist reads"
            if name == "KFDIST_CONTROL_ADDRESS":
                split_address(value)
        try:
            yield from self._faults(list(self.words))
            if self.config is None:
                self.config = load_config(None, environment=self.environment)
        except ConfigError as error:
            yield f"{self.where}: {error}"

    def _faults(self, words: list[str]) -> Iterator[str]:
        if words[:2] == ["tini", "--"]:
            words = words[2:]
        if words[:1] == ["kfdist"]:
            yield from self._kfdist(words[1:])
        elif words[:1] == ["torchrun"]:
            try:
                self.parsed = get_args_parser().parse_args(words[1:])
            except SystemExit:
                yield f"{self.where}: torchrun doesn't understand {' '.join(words)!r}"
                return
            if not self.parsed.module or self.parsed.training_script != "kfdist":
                yield f"{self.where}: torchrun starts {self.parsed.training_script!r}, not -m kfdist"
            yield from self._kfdist(self.parsed.training_script_args)
        elif words[:1] == ["sh"]:
            for line in words[-1].replace("||", "\n").splitlines():
                if line.split()[:1] == ["kfdist"]:
                    yield from self._kfdist(shlex.split(line)[1:])
        elif words[:2] != ["test", "-s"]:
            yield f"{self.where}: {' '.join(words)!r} is neither kfdist, torchrun nor test"

    def _kfdist(self, words: list[str]) -> Iterator[str]:
        command: Any = _kfdist()
        names = []
        while hasattr(command, "commands"):
            name = words.pop(0) if words else ""
            if name not in command.commands:
                yield f"{self.where}: kfdist has no command {' '.join([*names, name])!r}"
                return
            command = command.commands[name]
            names.append(name)
        try:
            parsed = command.make_context(" ".join(names), words).params
        except Exception as error:  # whatever the parser calls it
            yield f"{self.where}: kfdist {' '.join(names)}: {getattr(error, 'message', error)}"
            return
        if "config" in parsed:
            yield from self._load(parsed)

    def _load(self, parsed: Mapping[str, Any]) -> Iterator[str]:
        given = [*(parsed["overrides"] or ())]
        if parsed.get("controller") is not None:
            given.append(f'control.address="{parsed["controller"]}"')
        path = parsed["config"]
        if path is None:
            self.config = load_config(None, overrides=given, environment=self.environment)
        elif str(path) not in self.configs:
            yield f"{self.where}: no file is mounted at {path}"
        else:
            with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
                file.write(self.configs[str(path)])
                file.flush()
                self.config = load_config(Path(file.name), overrides=given, environment=self.environment)


@cache
def _kfdist() -> Any:
    return typer.main.get_command(app)

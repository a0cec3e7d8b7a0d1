"""The files under deploy/ and docker/ as the checks read them, and with one thing changed."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
DOCKERFILE = "docker/Dockerfile"
COMPOSE = "docker/compose.yaml"
SCRAPE = "deploy/prometheus/prometheus.yml"
RECORDING = "deploy/prometheus/recording.yml"
ALERTS = "deploy/prometheus/alerts.yml"
MONITORING = "deploy/kubernetes/service/monitoring.yaml"
BOARD_FOLDER = "deploy/grafana/dashboards"
RUN_BOARD, INVERSION_BOARD = f"{BOARD_FOLDER}/kfdist-run.json", f"{BOARD_FOLDER}/kfdist-inversion.json"

_SUFFIXES = {".yaml", ".yml", ".toml", ".json"}


@dataclass(frozen=True)
class Files:
    """Texts by path from the repository's root."""

    texts: Mapping[str, str]

    @classmethod
    def load(cls) -> "Files":
        paths = [path for folder in ("deploy", "docker") for path in (ROOT / folder).rglob("*")]
        kept = [path for path in paths if path.suffix in _SUFFIXES or path.name == "Dockerfile"]
        return cls({str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in kept})

    def changed(self, path: str, old: str, new: str) -> "Files":
        assert old in self.texts[path], f"{path} has no {old!r} to break"
        return Files({**self.texts, path: self.texts[path].replace(old, new, 1)})

    def documents(self, path: str) -> list[Any]:
        return _documents(self.texts[path])

    def paths(self, pattern: str) -> list[str]:
        return sorted(path for path in self.texts if re.fullmatch(pattern, path))

    def objects(self, folder: str = "deploy/k") -> Iterator[tuple[str, dict[str, Any]]]:
        """Yields (path, object) of what Kubernetes gets, kustomizations included."""
        for path in self.paths(rf"{folder}.*\.yaml"):
            for found in self.documents(path):
                yield path, found


@lru_cache(maxsize=256)
def _documents(text: str) -> list[Any]:
    return list(yaml.load_all(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)))


Check = Callable[[Files], Iterator[str]]
"""Yields what is wrong, a sentence each that names the file."""


@dataclass(frozen=True)
class Stage:
    """A stage of the Dockerfile: its name, what it is from, and its instructions (name, arguments)."""

    name: str
    base: str
    instructions: list[tuple[str, str]]

    def of(self, instruction: str) -> list[str]:
        return [arguments for name, arguments in self.instructions if name == instruction]


def stages(text: str) -> dict[str, Stage]:
    """Reads a Dockerfile; what stands before its first FROM is in the stage ""."""
    found = {"": Stage("", "", [])}
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    for line in lines.replace("\\\n", " ").splitlines():
        instruction, _, arguments = line.strip().partition(" ")
        if instruction == "FROM":
            base, _, name = arguments.partition(" AS ")
            found[name] = Stage(name, base, [])
        elif instruction:
            next(reversed(found.values())).instructions.append((instruction, arguments.strip()))
    return found

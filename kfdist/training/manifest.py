"""What a checkpoint says about itself: `manifest.json`, written last, with a hash over everything."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kfdist.errors import CheckpointError

FORMAT = 2
"""Version of the layout of a checkpoint's directory and files."""

NAME = "manifest.json"


class OtherFormat(CheckpointError):
    """A checkpoint is whole, as far as it can be read, but of another version's format."""


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """One file of a checkpoint.

    Attributes:
        bytes: Its size.
        sha256: Its SHA-256, hexadecimal.
    """

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A checkpoint's table of contents.

    Attributes:
        step: Steps that were done when it was written; the next step to do.
        world_size: Ranks that wrote it.
        statistics: "per-rank" or "folded".
        config_sha256: SHA-256 of the resolved configuration as TOML.
        files: Every other file of the directory by name.
        facts: Whatever else is good to know: the run's name, versions, the time.
        format: Version of the layout.
    """

    step: int
    world_size: int
    statistics: str
    config_sha256: str
    files: Mapping[str, FileEntry]
    facts: Mapping[str, Any] = field(default_factory=dict)
    format: int = FORMAT

    def as_json(self) -> dict[str, Any]:
        """Returns what JSON can say, with a hash over itself as `sha256`."""
        content = asdict(self)
        return {**content, "sha256": _digest(content)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Manifest":
        """Returns what `as_json` was made from; unchecked."""
        files = {name: FileEntry(**entry) for name, entry in content["files"].items()}
        return cls(**{key: value for key, value in content.items() if key not in ("sha256", "files")}, files=files)

    def encode(self) -> bytes:
        """Writes it as JSON."""
        return json.dumps(self.as_json(), indent=1, sort_keys=True).encode()

    @classmethod
    def read(cls, directory: Path) -> "Manifest":
        """Reads and checks a checkpoint's manifest, not its other files.

        Raises:
            OtherFormat: Another version of kfdist wrote it.
            CheckpointError: It is missing, torn or damaged.
        """
        try:
            content = json.loads((directory / NAME).read_bytes())
            digest = content.pop("sha256")
            if digest != _digest(content):
                raise CheckpointError(f"{NAME} doesn't match its own hash")
            if content["format"] != FORMAT:
                raise OtherFormat(
                    f"{NAME} has format {content['format']!r} and this version of kfdist reads {FORMAT}; resume with "
                    "the version that wrote it, or train anew in another directory (run.dir)"
                )
            return cls.from_json(content)
        except FileNotFoundError:
            raise CheckpointError(f"{NAME} is missing") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{NAME} can't be read: {error!r}") from error

    def check_file(self, directory: Path, name: str) -> bytes:
        """Reads one file and checks it against its entry.

        Raises:
            CheckpointError: It is missing, too short or too long, or its content was changed.
        """
        entry = self.files[name]
        try:
            content = (directory / name).read_bytes()
        except OSError as error:
            raise CheckpointError(f"{name} can't be read ({error.strerror})") from error
        if len(content) != entry.bytes:
            raise CheckpointError(f"{name} has {len(content)} bytes instead of {entry.bytes}")
        if hashlib.sha256(content).hexdigest() != entry.sha256:
            raise CheckpointError(f"{name} doesn't match its hash")
        return content


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

"""TensorBoard: event files in the run directory, which a resumed run goes on with."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from typing_extensions import override

from kfdist.training.trackers.tracker import Numbers, Tracker

DIRECTORY = "tensorboard"
"""In the run directory: tensorboard --logdir RUN/tensorboard shows it."""


class TensorBoardTracker(Tracker):
    """Writes scalars, and the settings as a text.

    Args:
        directory: The run directory.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory / DIRECTORY
        self._writer: Any = None

    @override
    def start(self, config: Mapping[str, Any], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What files of earlier starts have of later steps is not shown any more.
        self._writer = SummaryWriter(str(self._directory), purge_step=step + 1 if step else None)
        rows = "\n".join(f"| {key} | {value} |" for key, value in config.items())
        self._writer.add_text("configuration", f"| key | value |\n|---|---|\n{rows}", step)

    @override
    def log(self, numbers: Sequence[Numbers]) -> None:
        for step, values in numbers:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
        self._writer.flush()

    @override
    def close(self, status: str) -> None:
        del status
        self._writer.close()

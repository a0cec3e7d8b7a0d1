"""What the measurements of a step give reason to say: doubts about N, blocks that weren't measured, padding, masks."""

import warnings
from collections.abc import Sequence

from kfdist.capture.capture import Capture
from kfdist.curvature.blocks import Block
from kfdist.errors import KfdistWarning
from kfdist.runtime.masking import MaskNotice
from kfdist.runtime.padding import PaddingNotice
from kfdist.runtime.plan.coverage import unmeasured_warning
from kfdist.types import BlockName


class Notices:
    """Warns of each thing once; no step waits for numbers of the device.

    Args:
        blocks: Those that are measured.

    Attributes:
        masks: Knows what masks left out.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.masks = MaskNotice([block.name for block in blocks if block.maskable])
        self._padding = PaddingNotice()
        self._said: set[tuple[BlockName, str]] = set()
        self._doubted = False

    @property
    def coming(self) -> bool:
        """Whether numbers are on their way to the host, for which `look` is to be called also where nothing is new."""
        return self._padding.coming or self.masks.coming

    def look(self, capture: Capture, step: int, *, level: int) -> None:
        """Takes what was measured for a step, and warns.

        Args:
            capture: Has been drained.
            step: The step.
            level: Whose line the warnings show.
        """
        if capture.doubts and not self._doubted:
            self._doubted = True
            warnings.warn(
                f"{capture.doubts[0]}, by which the statistics are scaled; call preconditioner.batch(examples=...) "
                "before each backward, with the number of terms that the loss averages",
                KfdistWarning,
                stacklevel=level,
            )
        new = dict(capture.unmeasured.items() - self._said)
        if new:
            self._said.update(new.items())
            warnings.warn(unmeasured_warning(new, step), KfdistWarning, stacklevel=level)
        self._padding.look(capture.zero_rows, level=level + 1)
        self.masks.look(capture.masked, step, unseen=capture.unseen, level=level + 1)

"""What is said of masks: how much they left out, and where they fit no layer or hold other numbers than 0 and 1."""

import warnings
from collections.abc import Collection, Mapping, Sequence

import torch

from kfdist.capture.masks import MaskedRows
from kfdist.comm.host_copy import HostCopy
from kfdist.errors import KfdistWarning
from kfdist.types import BlockName


class MaskNotice:
    """Warns once of each fault, and describes masks for `coverage()`; no step waits for numbers of the device.

    Args:
        maskable: The blocks of whose rows a mask can leave out some.
    """

    def __init__(self, maskable: Collection[BlockName]) -> None:
        self._maskable = frozenset(maskable)
        self._coming: tuple[int, Sequence[int], HostCopy] | None = None
        self._ignored: HostCopy | None = None
        self._unfit_targets: dict[BlockName, tuple[int, int]] = {}
        self._unfit: dict[BlockName, tuple[int, int]] = {}
        self._routed = self._fitted = self._strange = False
        self._share = ""
        self._said: set[str] = set()

    @property
    def coming(self) -> bool:
        """Whether numbers are on their way."""
        return self._coming is not None or (self._ignored is not None and not self._fitted)

    def look(self, masked: MaskedRows, step: int, *, unseen: Collection[BlockName], level: int) -> None:
        """Takes one step's masks, unless the numbers of others are still on their way, and warns of what is known.

        Args:
            masked: What became of them.
            step: The step.
            unseen: The blocks that aren't measured at all.
            level: Whose line the warnings show.
        """
        self._unfit |= masked.unfit
        self._routed = self._routed or bool(masked.routed)
        self._fitted = self._fitted or bool(masked.counts)
        if self._coming is None and masked.counts:
            left = [rows.to(torch.int64) for rows, _ in masked.counts.values()]
            left += [strange.to(left[0]) for strange in masked.strange]
            self._coming = step, [of for _, of in masked.counts.values()], HostCopy([torch.stack(left)])
        self._take_if_ready()
        self._look_at_targets(masked, unseen, level + 1)
        if masked.shape is not None and not self._fitted and self._unfit.keys() >= self._maskable - set(unseen):
            self._warn(
                "unfit",
                f"batch(mask=...) was given a mask {list(masked.shape)} that fits no layer{_largest(self._unfit)}, so "
                "that nothing was left out; it must be [N, T], like the first two dimensions of the layers' inputs",
                level + 1,
            )
        if self._strange:
            self._warn(
                "strange",
                "batch(mask=...) was given other numbers than 0 and 1, of which all but 0 count as 1; give 1 where a "
                "position counts and 0 where it is padding, or booleans",
                level + 1,
            )

    def _look_at_targets(self, masked: MaskedRows, unseen: Collection[BlockName], level: int) -> None:
        """Warns where targets are ignored and no layer has their positions, as with `logits[:, :-1]`."""
        targets, blocks = masked.targets
        self._unfit_targets |= blocks
        if self._fitted or not self._unfit_targets.keys() >= self._maskable - set(unseen):
            return
        if targets and self._ignored is None:
            self._ignored = HostCopy([torch.stack([(~each).any() for each in targets])])
        if self._ignored is None or not self._ignored.ready():
            return
        ignored, self._ignored = bool(self._ignored.wait()[0].any()), None
        if ignored:
            self._warn(
                "target",
                "observe() was given a target with ignored terms whose positions no layer has"
                f"{_largest(self._unfit_targets)}, so that padding counts in the statistics; give logits and labels of "
                "the layers' length, where labels are shifted F.pad(labels[:, 1:], (0, 1), value=-100), or say "
                "batch(mask=...)",
                level + 1,
            )

    def describe(self) -> str:
        """Says what is known of the masks in use; empty where there are none."""
        self._take_if_ready()
        if not self._share:
            return ""
        unfit = f"; the inputs of {len(self._unfit)} have other positions{_largest(self._unfit)}" if self._unfit else ""
        routed = "; of experts, rows without any gradient were taken for what it leaves out" if self._routed else ""
        return f"a mask is in use: {self._share}{unfit}{routed}"

    def _take_if_ready(self) -> None:
        if self._coming is None or not self._coming[2].ready():
            return
        (step, rows, copy), self._coming = self._coming, None
        numbers = copy.wait()[0].tolist()
        left = numbers[: len(rows)]
        self._share = (
            f"at step {step} it left out {sum(left) / max(1, sum(rows)):.1%} of the rows of {len(rows)} blocks"
        )
        self._strange = self._strange or any(numbers[len(rows) :])

    def _warn(self, fault: str, text: str, level: int) -> None:
        if fault not in self._said:
            self._said.add(fault)
            warnings.warn(text, KfdistWarning, stacklevel=level)


def _largest(unfit: Mapping[BlockName, tuple[int, int]]) -> str:
    """Names the layer with the most positions among those that no mask fits."""
    if not unfit:
        return ""
    name, (n, positions) = max(unfit.items(), key=lambda each: each[1][1])
    return f" ({name or 'the model'!r} has {n} x {positions})"

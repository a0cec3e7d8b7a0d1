"""Which rows of a layer are padding.

Padding is what a mask leaves out and no gradient came to: tokens whose loss is ignored take part in the loss of others
through attention, and a row with a gradient is a part of the layer's gradient. A gradient of zero alone says nothing:
dead units and underflow make them too. Such rows stay, and a large share of them is warned of
(`kfdist.runtime.padding`).
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kfdist.capture.stated import Stated
from kfdist.errors import ConfigError


def checked_mask(mask: object) -> tuple[Bool[Tensor, "N T"], Bool[Tensor, ""] | None]:
    """Returns a mask as booleans, and whether it holds other numbers than 0 and 1, where only its device knows.

    Raises:
        ConfigError: It is no tensor `[N, T]` of booleans, or of zeros and ones.
    """
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        found = f"has shape {list(mask.shape)}" if isinstance(mask, Tensor) else f"is a {type(mask).__name__}"
        raise ConfigError(f"mask {found}; must be a tensor [N, T], True or 1 where a position counts")
    if mask.dtype == torch.bool:
        return mask.detach(), None
    mask = mask.detach()
    strange = ~((mask == 0) | (mask == 1)).all()
    if not _on_host(mask):
        return mask != 0, strange
    if bool(strange):
        raise ConfigError(
            f"mask holds other numbers than 0 and 1 (from {mask.min().item():.6g} to {mask.max().item():.6g}); give 1 "
            "where a position counts and 0 where it is padding, or booleans"
        )
    return mask != 0, None


def _on_host(tensor: Tensor) -> bool:
    """Whether numbers are read without waiting for a device."""
    return tensor.device.type == "cpu"


def aligned(mask: Bool[Tensor, "..."], shape: tuple[int, int]) -> Bool[Tensor, "n t"] | None:
    """Lays a mask out as a layer's inputs.

    Args:
        mask: `[N, T]`, or these one after another; `[T, N]` too, where the layer's inputs lie so.
        shape: N and T of the layer's inputs.

    Returns:
        The mask, or None where it isn't of these positions (a layer behind pooling, another sequence).
    """
    n, t = shape
    if mask.dim() == 1:
        return mask.view(n, t) if mask.numel() == n * t else None
    if tuple(mask.shape) == shape or tuple(mask.T.shape) == shape:
        return mask if tuple(mask.shape) == shape else mask.T
    return mask.reshape(n, 1) if t == 1 and mask.numel() == n else None


_MANY_ROWS = 256
"""Rows of which a part says how many are zero."""


class ZeroRows:
    """Counts output-gradient rows that are exactly zero where no mask tells of padding.

    Attributes:
        counts: By block, how many are, a tensor on its device, and of how many.
    """

    def __init__(self) -> None:
        self.counts: dict[str, tuple[Tensor, int]] = {}

    def add(self, name: str, output_gradient: Float[Tensor, "N T p"]) -> None:
        """Counts the rows of one call of a layer; of many an eighth, spread over positions or examples."""
        dim = 1 if output_gradient.shape[1] > 1 else 0
        if output_gradient.shape[:2].numel() >= _MANY_ROWS and output_gradient.shape[dim] >= _MANY_ROWS // 8:
            every = slice(None, None, 8)
            output_gradient = output_gradient[:, every] if dim else output_gradient[every]
        zeros, rows = (output_gradient == 0).all(-1).sum(), output_gradient.shape[:2].numel()
        if name in self.counts:
            before, rows_before = self.counts[name]
            zeros, rows = before + zeros, rows_before + rows
        self.counts[name] = zeros, rows


@dataclass
class MaskedRows:
    """What became of the masks that were stated since the last drain.

    Attributes:
        shape: Of the last one; None where there was none.
        counts: By block, how many rows were left out, a tensor on its device, and of how many.
        unfit: By block whose inputs have other positions than the mask, their N and T.
        routed: Blocks of experts, of whose rows those without any gradient were left out.
        strange: Whether masks held other numbers than 0 and 1, where only the device knows.
        targets: Masks of targets' ignored terms that don't have the positions of a block's inputs, and by such block
            the N and T of these.
    """

    shape: tuple[int, ...] | None = None
    counts: dict[str, tuple[Tensor, int]] = field(default_factory=dict)
    unfit: dict[str, tuple[int, int]] = field(default_factory=dict)
    routed: set[str] = field(default_factory=set)
    strange: list[Tensor] = field(default_factory=list)
    targets: tuple[list[Tensor], dict[str, tuple[int, int]]] = field(default_factory=lambda: ([], {}))

    def note(self, stated: Stated) -> None:
        """Notes which mask a call was measured under."""
        if stated.mask is None or stated.from_target:
            return
        self.shape = tuple(stated.mask.shape)
        if stated.strange is not None and not any(each is stated.strange for each in self.strange):
            self.strange.append(stated.strange)

    def fits_not(self, name: str, stated: Stated, shape: tuple[int, int]) -> None:
        """Notes that a block's inputs, of N and T, have other positions than the mask."""
        if not stated.from_target or stated.mask is None:
            self.unfit[name] = shape
            return
        masks, blocks = self.targets
        blocks[name] = shape
        if not any(each is stated.mask for each in masks):
            masks.append(stated.mask)

    def add(self, name: str, kept: Tensor, rows: int) -> None:
        """Counts rows of a block, and how many of them were kept."""
        left, of = self.counts.get(name, (torch.zeros_like(kept), 0))
        self.counts[name] = left + rows - kept, of + rows

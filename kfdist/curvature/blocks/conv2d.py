"""Two-dimensional convolutions (KFC, Grosse & Martens, arXiv 1602.01407; algorithms.md 2).

A convolution is a fully connected layer on patches: q = channels x kernel height x kernel width, in the order of the
flattened weight, plus the homogeneous coordinate. Stride, padding and dilation enter only through the patches; padded
values count as inputs. Each group is a matrix of its own.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kfdist.curvature.blocks.base import Block, accumulation_dtype, draw_positions, with_homogeneous
from kfdist.curvature.statistics import FactorSums
from kfdist.types import BlockName, BlockShape

TILE_BYTES = 32 << 20
"""Patches held at once. The im2col of a whole batch can be a hundred times its images; a tile of this size is large
enough that the matrix product dominates its overhead, and small beside the activations of any model that needs
tiling."""


class Padding(NamedTuple):
    """Values added on each side."""

    left: int
    right: int
    top: int
    bottom: int


class Conv2dBlock(Block):
    """Block of an `nn.Conv2d` on inputs `[N, C, H, W]`; an image without examples, `[C, H, W]`, is taken as N = 1.

    Any stride, padding (numbers, "same", "valid"), padding mode, dilation and groups.
    """

    def __init__(self, name: BlockName, module: nn.Conv2d) -> None:
        super().__init__(name, module)
        self._conv = module
        patch = module.in_channels // module.groups * module.kernel_size[0] * module.kernel_size[1]
        self.shape = BlockShape(
            d_out=module.out_channels // module.groups, d_in=patch + self.has_bias, groups=module.groups
        )
        self._padding = _padding_of(module)

    def factor_sums(
        self, activation: Tensor, output_gradient: Tensor, *, positions_fraction: float = 1.0, seed: int = 0
    ) -> FactorSums:
        """Sums a a^T and g g^T over examples and output positions; see `Block.factor_sums`."""
        images, g = self._batched(activation, output_gradient)
        height, width = self._output_size(images)
        positions = height * width
        chosen = draw_positions(positions, positions_fraction, seed)
        scale = 1.0 if chosen is None else positions / len(chosen)
        used = positions if chosen is None else len(chosen)
        if chosen is not None:
            chosen = chosen.to(images.device, non_blocking=True)
        c, p, patch = self.shape.groups, self.shape.d_out, self.shape.d_in - self.has_bias
        dtype = accumulation_dtype(images)
        A, sums = images.new_zeros(c, patch, patch, dtype=dtype), images.new_zeros(c, patch, dtype=dtype)
        G = g.new_zeros(c, p, p, dtype=accumulation_dtype(g))
        tile = max(1, TILE_BYTES // max(1, c * patch * used * dtype.itemsize))
        with torch.autocast(images.device.type, enabled=False):
            for start in range(0, len(images), tile):
                a_rows = self._patches(images[start : start + tile], chosen)
                A += a_rows.mT @ a_rows
                sums += a_rows.sum(1)
                g_rows = self._output_rows(g[start : start + tile], chosen)
                G += g_rows.mT @ g_rows
            rows = len(images) * positions
            A, G = A * scale, G * scale
            if self.has_bias:
                A = with_homogeneous(A, sums * scale, rows)
        return FactorSums(A=A, G=G, rows=rows)

    def _batched(self, activation: Tensor, output_gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Checks the two tensors and returns them as `[N, C, H, W]`."""
        images, g = activation.detach(), output_gradient.detach()
        if images.dim() == 3 and g.dim() == 3:
            images, g = images.unsqueeze(0), g.unsqueeze(0)
        if images.dim() != 4 or images.shape[1] != self._conv.in_channels:
            raise ValueError(
                f"block {self.name}: activation has shape {tuple(activation.shape)}, must be "
                f"[N, {self._conv.in_channels}, H, W]; was the layer replaced or resized?"
            )
        expected = (len(images), self._conv.out_channels, *self._output_size(images))
        if tuple(g.shape) != expected:
            raise ValueError(
                f"block {self.name}: output gradient has shape {tuple(output_gradient.shape)}, must be {expected} "
                f"for an activation of shape {tuple(activation.shape)}"
            )
        return images, g

    def _output_size(self, images: Tensor) -> tuple[int, int]:
        pad, conv = self._padding, self._conv
        padded = (images.shape[2] + pad.top + pad.bottom, images.shape[3] + pad.left + pad.right)
        height, width = (
            (padded[i] - conv.dilation[i] * (conv.kernel_size[i] - 1) - 1) // conv.stride[i] + 1 for i in (0, 1)
        )
        return height, width

    def _patches(self, images: Tensor, chosen: Tensor | None) -> Tensor:
        """Extracts the patches of `images` as rows `[c, n T, patch]`, only at the `chosen` positions if given."""
        conv = self._conv
        if any(self._padding):
            mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
            images = F.pad(images, self._padding, mode=mode)
        height, width = ((conv.kernel_size[i] - 1) * conv.dilation[i] + 1 for i in (0, 1))
        # Windows are views: nothing is copied before the rows are laid out.
        windows = images.unfold(2, height, conv.stride[0]).unfold(3, width, conv.stride[1])
        windows = windows[..., :: conv.dilation[0], :: conv.dilation[1]]
        windows = windows.unflatten(1, (conv.groups, -1))  # [n, c, channels, H_out, W_out, kh, kw]
        if chosen is None:
            rows = windows.permute(1, 0, 3, 4, 2, 5, 6)
        else:
            across = windows.shape[4]
            rows = windows[:, :, :, chosen // across, chosen % across].permute(1, 0, 3, 2, 4, 5)
        return rows.reshape(conv.groups, -1, self.shape.d_in - self.has_bias).to(accumulation_dtype(images))

    def _output_rows(self, g: Tensor, chosen: Tensor | None) -> Tensor:
        """Lays output gradients out as rows `[c, n T, p]`."""
        grouped = g.flatten(2).unflatten(1, (self.shape.groups, -1))  # [n, c, p, T]
        if chosen is not None:
            grouped = grouped.index_select(-1, chosen)
        rows = grouped.permute(1, 0, 3, 2).reshape(self.shape.groups, -1, self.shape.d_out)
        return rows.to(accumulation_dtype(g))


def _padding_of(conv: nn.Conv2d) -> Padding:
    """Returns what torch adds on each side; "same" puts an odd remainder at the end."""
    if conv.padding == "valid":
        return Padding(0, 0, 0, 0)
    if conv.padding == "same":
        total = [conv.dilation[i] * (conv.kernel_size[i] - 1) for i in (0, 1)]
        return Padding(total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2)
    assert not isinstance(conv.padding, str), "nn.Conv2d allows no other words"
    vertical, horizontal = (int(value) for value in conv.padding)
    return Padding(horizontal, horizontal, vertical, vertical)

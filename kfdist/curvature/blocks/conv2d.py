"""Two-dimensional convolutions (KFC, Grosse & Martens, arXiv 1602.01407; algorithms.md 2).

A convolution is a fully connected layer on patches: q = channels x kernel height x kernel width, in the order of the
flattened weight, plus the homogeneous coordinate. Stride, padding and dilation enter only through the patches; padded
values count as inputs. Each group is a matrix of its own.
"""

from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from kfdist.curvature.blocks.base import Block
from kfdist.types import BlockName, BlockShape


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

    def batched(self, activation: Tensor, output_gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Returns both as `[N, C, H, W]`; see `Block.batched`."""
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

    def positions(self, activation: Tensor) -> int:
        """Returns the number of output positions."""
        height, width = self._output_size(activation)
        return height * width

    def input_rows(self, activation: Tensor, chosen: Tensor | None = None) -> Tensor:
        """Extracts the patches (im2col), in the order of the flattened weight; see `Block.input_rows`."""
        conv = self._conv
        if any(self._padding):
            mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
            activation = F.pad(activation, self._padding, mode=mode)
        height, width = ((conv.kernel_size[i] - 1) * conv.dilation[i] + 1 for i in (0, 1))
        # Windows are views, so nothing is copied before the rows are laid out, and only the chosen ones are.
        windows = activation.unfold(2, height, conv.stride[0]).unfold(3, width, conv.stride[1])
        windows = windows[..., :: conv.dilation[0], :: conv.dilation[1]]
        windows = windows.unflatten(1, (conv.groups, -1))  # [N, c, channels, H_out, W_out, kh, kw]
        if chosen is None:
            rows = windows.permute(1, 0, 3, 4, 2, 5, 6)
        else:
            across = windows.shape[4]
            rows = windows[:, :, :, chosen // across, chosen % across].permute(1, 0, 3, 2, 4, 5)
        return rows.reshape(conv.groups, -1, self.shape.d_in - self.has_bias)

    def output_rows(self, output_gradient: Tensor, chosen: Tensor | None = None) -> Tensor:
        """Moves the channels of each group last; see `Block.output_rows`."""
        grouped = output_gradient.flatten(2).unflatten(1, (self.shape.groups, -1))  # [N, c, p, T]
        if chosen is not None:
            grouped = grouped.index_select(-1, chosen)
        return grouped.permute(1, 0, 3, 2).reshape(self.shape.groups, -1, self.shape.d_out)

    def _output_size(self, images: Tensor) -> tuple[int, int]:
        pad, conv = self._padding, self._conv
        padded = (images.shape[2] + pad.top + pad.bottom, images.shape[3] + pad.left + pad.right)
        height, width = (
            (padded[i] - conv.dilation[i] * (conv.kernel_size[i] - 1) - 1) // conv.stride[i] + 1 for i in (0, 1)
        )
        return height, width


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

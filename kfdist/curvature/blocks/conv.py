"""Convolutions over one to three dimensions (KFC, Grosse & Martens, arXiv 1602.01407; algorithms.md 2).

A convolution is a fully connected layer on patches: q = channels x kernel size, in the order of the flattened weight,
plus the homogeneous coordinate. Stride, padding and dilation enter only through the patches; padded values count as
inputs. Each group is a separate matrix.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from kfdist.curvature.blocks.base import Operation, ParameterPart
from kfdist.curvature.blocks.layer_block import LayerBlock
from kfdist.curvature.thin_sums import Columns
from kfdist.linalg.uploads import sent
from kfdist.torch_internals import Convolution
from kfdist.types import BlockName, BlockShape

Sizes = tuple[int, ...]
"""One number per spatial dimension."""


class AbstractConvBlock(LayerBlock):
    """What blocks of all convolutions have in common: inputs `[N, C, *spatial]`, `[C, *spatial]` taken as N = 1.

    A subclass says how the layer's input becomes the padded input of a plain convolution with `_stride`: its pixels lie
    on a grid, `_spread` apart, and the first patch begins `_before` the first one.
    """

    _before: Sizes

    def __init__(self, name: BlockName, module: Convolution, bias: ParameterPart | None, stride: Sizes) -> None:
        super().__init__(name, module, ParameterPart.weight_of(module), bias)
        self._conv = module
        self._dims = len(module.kernel_size)
        self._stride = stride
        self._spread: Sizes = (1,) * self._dims
        patch = module.in_channels // module.groups * math.prod(module.kernel_size)
        self.shape = BlockShape(
            d_out=module.out_channels // module.groups,
            d_in=patch + self.homogeneous,
            groups=module.groups,
            convolution=True,
        )
        # How far a patch reaches: the kernel with the gaps of its dilation.
        sizes = zip(module.dilation, module.kernel_size, strict=True)
        self._reach = tuple(dilation * (size - 1) + 1 for dilation, size in sizes)

    @abstractmethod
    def _output_size(self, spatial: Sizes, found: Sizes) -> Sizes:
        """Returns the outputs' size for inputs of size `spatial`; `found` itself where the layer leaves it room."""

    @override
    def batched(
        self, activation: Float[Tensor, "..."], output_gradient: Float[Tensor, "..."]
    ) -> tuple[Float[Tensor, "N C ..."], Float[Tensor, "N D ..."]]:
        images, g = activation.detach(), output_gradient.detach()
        if images.dim() == g.dim() == self._dims + 1:
            images, g = images.unsqueeze(0), g.unsqueeze(0)
        if images.dim() != self._dims + 2 or images.shape[1] != self._conv.in_channels:
            letters = ", ".join("DHW"[3 - self._dims :])
            raise ValueError(
                f"block {self.name}: activation has shape {tuple(activation.shape)}, must be "
                f"[N, {self._conv.in_channels}, {letters}]; was the layer replaced or resized?"
            )
        spatial = self._output_size(tuple(images.shape[2:]), tuple(g.shape[2:]))
        expected = (len(images), self._conv.out_channels, *spatial)
        if tuple(g.shape) != expected:
            raise ValueError(
                f"block {self.name}: output gradient has shape {tuple(output_gradient.shape)}, must be {expected} "
                f"for an activation of shape {tuple(activation.shape)}"
            )
        return images, g

    @override
    def positions(
        self, activation: Float[Tensor, "N C ..."], output_gradient: Float[Tensor, "N D ..."] | None = None
    ) -> int:
        found = () if output_gradient is None else tuple(output_gradient.shape[2:])
        return math.prod(self._output_size(tuple(activation.shape[2:]), found))

    @override
    def padded_elements(self, output_gradient: Float[Tensor, "N D ..."]) -> int:
        sizes = zip(output_gradient.shape[2:], self._stride, self._reach, strict=True)
        covered = math.prod((size - 1) * stride + reach for size, stride, reach in sizes)
        return self._conv.in_channels * covered

    @property
    @override
    def input_features(self) -> int:
        return 1 + self._dims

    @override
    def input_windows(
        self, padded: Float[Tensor, "N C ..."], chosen: Int64[Tensor, " used"] | None = None
    ) -> Float[Tensor, "c N ..."]:
        """Shows the patches, `[c, N, *positions, channels, *kernel]`."""
        # Windows are views, so nothing is copied before rows are laid out, and only the chosen ones are.
        windows, dims = padded, self._dims
        for i in range(dims):
            windows = windows.unfold(2 + i, self._reach[i], self._stride[i])
        windows = windows[(..., *(slice(None, None, step) for step in self._conv.dilation))]
        windows = windows.unflatten(1, (self._conv.groups, -1))  # [N, c, channels, *positions, *kernel]
        windows = windows.permute(1, 0, *range(3, 3 + dims), 2, *range(3 + dims, 3 + 2 * dims))
        if chosen is None:
            return windows
        indices = []
        for size in reversed(windows.shape[2 : 2 + dims]):
            indices.insert(0, chosen % size)
            chosen = chosen // size
        return windows[(slice(None), slice(None), *indices)]

    @override
    def output_windows(
        self, output_gradient: Float[Tensor, "N D ..."], chosen: Int64[Tensor, " used"] | None = None
    ) -> Float[Tensor, "c N _ p"]:
        """Moves the channels of each group last."""
        grouped = output_gradient.flatten(2).unflatten(1, (self.shape.groups, -1))  # [N, c, p, T]
        if chosen is not None:
            grouped = grouped.index_select(-1, chosen)
        return grouped.permute(1, 0, 3, 2)

    @override
    def drawn_inputs(
        self,
        activation: Float[Tensor, "N C ..."],
        output_gradient: Float[Tensor, "N D ..."],
        chosen: Int64[Tensor, " r"],
    ) -> tuple[Float[Tensor, "c r w"], Columns | None]:
        """Picks the patches' pixels one by one: no image is padded, and no other patch is laid out."""
        dims, device, sizes = self._dims, activation.device, output_gradient.shape[2:]
        # From here on with the device: a patch has many pixels, whose numbers the host would work out in mid-backward.
        example, *at = _unravelled(sent(chosen, device), sizes)
        met = self._met_places(activation.shape[2:], sizes)
        index, within = [_along(example, 0, dims)], torch.ones((), dtype=torch.bool, device=device)
        for i, (position, places) in enumerate(zip(at, met, strict=True)):
            size, spread = activation.shape[2 + i], self._spread[i]
            place = torch.tensor(places, dtype=torch.int64, device="cpu") * self._conv.dilation[i] - self._before[i]
            pixel = position.unsqueeze(1) * self._stride[i] + sent(place, device)
            on_one = (pixel >= 0) & (pixel <= (size - 1) * spread) & (pixel % spread == 0)
            within = within & _along(on_one, 1 + i, dims)
            index.append(_along((pixel // spread).clamp(0, size - 1), 1 + i, dims))
        picked = activation.movedim(1, -1)[tuple(index)]
        rows = torch.where(within.unsqueeze(-1), picked, 0.0).movedim(-1, 1)
        rows = rows.unflatten(1, (self.shape.groups, -1)).flatten(2).transpose(0, 1)
        kernel, channels = self._conv.kernel_size, self._conv.in_channels // self.shape.groups
        if math.prod(map(len, met)) == math.prod(kernel):
            return rows, None
        if not self.homogeneous and all(len(places) == 1 for places in met):
            only = 0
            for size, (place,) in zip(kernel, met, strict=True):
                only = only * size + place
            return rows, slice(only, None, math.prod(kernel))
        columns = torch.arange(channels * math.prod(kernel), device="cpu").reshape(channels, *kernel)
        for i, places in enumerate(met):
            columns = columns.index_select(1 + i, torch.tensor(places, dtype=torch.int64, device="cpu"))
        return rows, sent(columns.flatten(), device)

    @override
    def drawn_outputs(
        self, output_gradient: Float[Tensor, "N D ..."], chosen: Int64[Tensor, " r"]
    ) -> Float[Tensor, "c r p"]:
        at = _unravelled(sent(chosen, output_gradient.device), output_gradient.shape[2:])
        rows = output_gradient.movedim(1, -1)[tuple(at)]
        return rows.unflatten(-1, (self.shape.groups, -1)).transpose(0, 1)

    @override
    def reached_inputs(self, activation: Float[Tensor, "N C ..."], output_gradient: Float[Tensor, "N D ..."]) -> int:
        """Counts those of a kernel's places that meet a pixel anywhere: of 3 x 3 places, one over maps of 1 x 1."""
        met = self._met_places(activation.shape[2:], output_gradient.shape[2:])
        return self._conv.in_channels // self.shape.groups * math.prod(map(len, met)) + self.homogeneous

    def _met_places(self, inputs: Sizes, outputs: Sizes) -> list[list[int]]:
        """Returns along each dimension which places of the kernel meet a pixel at any position."""
        met = []
        for i, (size, positions) in enumerate(zip(inputs, outputs, strict=True)):
            stride, dilation, before, spread = self._stride[i], self._conv.dilation[i], self._before[i], self._spread[i]
            pixels = range(0, (size - 1) * spread + 1, spread)
            found = [
                place
                for place in range(self._conv.kernel_size[i])
                if any(at * stride + place * dilation - before in pixels for at in range(positions))
            ]
            met.append(found)
        return met


class ConvBlock(AbstractConvBlock):
    """Block of an `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d`.

    Any stride, padding (numbers, "same", "valid"), padding mode, dilation and groups. With another padding mode than
    "zeros" the layer pads before it convolves: such a block's activations are padded ones.
    """

    def __init__(self, name: BlockName, module: Convolution, bias: ParameterPart | None) -> None:
        super().__init__(name, module, bias, stride=tuple(module.stride))
        padding = module.padding if module.padding_mode == "zeros" else (0,) * len(module.kernel_size)
        self._padding = _padding_of(padding, self._reach)
        self._before = tuple(before for before, _ in self._padding)
        self.operation = Operation(
            "convolution",
            stride=tuple(module.stride),
            padding=padding if isinstance(padding, str) else tuple(padding),
            dilation=tuple(module.dilation),
            groups=module.groups,
        )

    @override
    def _output_size(self, spatial: Sizes, found: Sizes) -> Sizes:
        del found
        sizes = zip(spatial, self._padding, self._reach, self._stride, strict=True)
        return tuple((size + sum(sides) - reach) // stride + 1 for size, sides, reach, stride in sizes)

    @override
    def padded(
        self, activation: Float[Tensor, "N C ..."], output_gradient: Float[Tensor, "N D ..."]
    ) -> Float[Tensor, "N C ..."]:
        """Pads as the layer does."""
        del output_gradient
        return F.pad(activation, _for_pad(self._padding)) if any(map(any, self._padding)) else activation

    @override
    def padded_elements(self, output_gradient: Float[Tensor, "N D ..."]) -> int:
        return super().padded_elements(output_gradient) if any(map(any, self._padding)) else 0


class ConvTransposeBlock(AbstractConvBlock):
    """Block of an `nn.ConvTranspose1d`, `nn.ConvTranspose2d` or `nn.ConvTranspose3d`.

    Such a layer is the plain convolution, with stride 1 and the kernel turned round, of its input with stride - 1 zeros
    set between the pixels: rows a are patches of that, rows g the output gradients at the output's positions. So

    - the bias is a homogeneous coordinate as in every convolution, and the gradient is exactly sum_t g_t a_t^T;
    - where output gradients are uncorrelated between positions and alike at all of them, KFC's own assumptions,
      Omega (x) Gamma is the Fisher block itself, as for a plain convolution; for example, that of a last layer under
      a squared error.

    Swapping the roles instead (algorithms.md 2.1: rows are the input's pixels and patches of the output gradient) has
    the first property for the weight alone, since some output positions are reached by more rows than others, and lacks
    the second wherever patches overlap. It has the smaller A: q = C_in against C_in times the kernel size here.

    Columns are in the order (channel, kernel turned round), bias last.
    """

    def __init__(self, name: BlockName, module: Convolution, bias: ParameterPart | None) -> None:
        super().__init__(name, module, bias, stride=(1,) * len(module.kernel_size))
        assert not isinstance(module.padding, str), "transposed convolutions allow no words"
        self._spread = tuple(module.stride)
        sizes = zip(self._reach, module.padding, strict=True)
        self._before = tuple(reach - 1 - int(padding) for reach, padding in sizes)
        self._kernel_dims = tuple(range(-self._dims, 0))
        self.operation = Operation(
            "transposed convolution",
            stride=tuple(module.stride),
            padding=tuple(map(int, module.padding)),
            dilation=tuple(module.dilation),
            groups=module.groups,
        )

    @override
    def _output_size(self, spatial: Sizes, found: Sizes) -> Sizes:
        conv = self._conv
        least = tuple(
            (size - 1) * spread + 2 * before + 2 - reach
            for size, spread, before, reach in zip(spatial, self._spread, self._before, self._reach, strict=True)
        )
        if len(found) == len(least):  # `output_size` may ask for more than the layer's own output_padding
            room = [max(spread, step) for spread, step in zip(self._spread, conv.dilation, strict=True)]
            if all(0 <= size - low < more for size, low, more in zip(found, least, room, strict=True)):
                return found
        return tuple(low + int(extra) for low, extra in zip(least, conv.output_padding, strict=True))

    @override
    def padded(
        self, activation: Float[Tensor, "N C ..."], output_gradient: Float[Tensor, "N D ..."]
    ) -> Float[Tensor, "N C ..."]:
        """Sets zeros between the pixels and around them (or cuts at the borders, where padding asks for it)."""
        spread = activation
        if any(step > 1 for step in self._spread):
            sizes = [(s - 1) * step + 1 for s, step in zip(activation.shape[2:], self._spread, strict=True)]
            spread = activation.new_zeros(*activation.shape[:2], *sizes)
            spread[(..., *(slice(None, None, step) for step in self._spread))] = activation
        sides = []
        for i, before in enumerate(self._before):
            needed = output_gradient.shape[2 + i] + self._reach[i] - 1
            sides.append((before, needed - before - spread.shape[2 + i]))
        return F.pad(spread, _for_pad(tuple(sides)))

    @override
    def _weight_matrix(self, weight: Tensor) -> Tensor:
        """Brings `[C_in, C_out / c, *kernel]` to `[c, C_out / c, C_in / c x kernel turned round]`."""
        turned = weight.flip(self._kernel_dims).unflatten(0, (self.shape.groups, -1))
        return turned.transpose(1, 2).reshape(self.shape.groups, self.shape.d_out, -1)

    @override
    def _weight_of(self, matrix: Tensor) -> Tensor:
        channels = self._conv.in_channels // self.shape.groups
        turned = matrix.reshape(self.shape.groups, self.shape.d_out, channels, *self._conv.kernel_size)
        return turned.transpose(1, 2).flatten(0, 1).flip(self._kernel_dims)


def _unravelled(chosen: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Returns the example of each row, and its position along each dimension.

    `torch.unravel_index` makes a tensor of the sizes, and the host would wait for its copy to the device.
    """
    found: list[Tensor] = []
    for size in reversed(sizes):
        found.insert(0, chosen % size)
        chosen = chosen // size
    return [chosen, *found]


def _along(index: Tensor, dim: int, dims: int) -> Tensor:
    """Shapes an index `[r]` or `[r, k]` so that its k lie along dimension `dim` of `[r, *kernel]`."""
    shape = [len(index)] + [1] * dims
    if index.dim() > 1:
        shape[dim] = index.shape[1]
    return index.reshape(shape)


def _padding_of(padding: Sizes | str, reach: Sizes) -> tuple[tuple[int, int], ...]:
    """Returns what torch adds before and after in each dimension; "same" puts an odd remainder at the end."""
    if padding == "valid":
        return ((0, 0),) * len(reach)
    if padding == "same":
        return tuple(((extent - 1) // 2, extent - 1 - (extent - 1) // 2) for extent in reach)
    assert not isinstance(padding, str), "convolutions allow no other words"
    return tuple((int(each), int(each)) for each in padding)


def _for_pad(sides: tuple[tuple[int, int], ...]) -> list[int]:
    """Returns paddings in the order of `F.pad`, the last dimension first."""
    return [value for pair in reversed(sides) for value in pair]

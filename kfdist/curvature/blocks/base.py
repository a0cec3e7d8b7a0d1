"""What a layer contributes to the curvature, whatever its kind."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from kfdist.curvature.statistics import FactorSums
from kfdist.types import BlockName, BlockShape

TILE_BYTES = 32 << 20
"""Rows held at once, in bytes. The patches of a whole batch of images can be a hundred times the images; a tile of this
size is large enough that the matrix product dominates its overhead, and small beside the activations of any model that
needs tiling."""


class Block(ABC):
    """One layer's diagonal block: turns what the layer saw into statistics, and reads and writes its gradients.

    Attributes:
        name: Dotted module name.
        module: The layer.
        shape: Of its gradient, as c matrices [p, q].
        has_bias: Whether the bias is part of the block, as the homogeneous coordinate.
    """

    shape: BlockShape

    def __init__(self, name: BlockName, module: nn.Linear | nn.Conv2d) -> None:
        weight, bias = module.weight, module.bias
        assert isinstance(weight, nn.Parameter), "make_block lets no other weight through"
        self.name = name
        self.module: nn.Module = module
        self._weight = weight
        self._bias = bias if isinstance(bias, nn.Parameter) and bias.requires_grad else None

    @property
    def has_bias(self) -> bool:
        """Whether the bias is part of the block; a frozen bias isn't."""
        return self._bias is not None

    @abstractmethod
    def batched(self, activation: Tensor, output_gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Checks what the layer saw in one call and brings it to one form, examples first.

        Args:
            activation: The layer's input.
            output_gradient: Gradient with respect to its output.

        Returns:
            Both, detached, as `input_rows` and `output_rows` take them; slices of them along dim 0 are taken too.

        Raises:
            ValueError: Shapes that don't belong to this layer or to each other.
        """

    @abstractmethod
    def positions(self, activation: Tensor) -> int:
        """Returns at how many positions T the weight is used in each example of a batched activation."""

    @abstractmethod
    def input_rows(self, activation: Tensor, chosen: Tensor | None = None) -> Tensor:
        """Lays a batched activation out as rows a, without the homogeneous coordinate.

        Args:
            activation: From `batched`.
            chosen: Positions to take, int64 on the same device; None for all.

        Returns:
            `[c, N T, q]`, example by example, in the activation's dtype.
        """

    @abstractmethod
    def output_rows(self, output_gradient: Tensor, chosen: Tensor | None = None) -> Tensor:
        """Lays a batched output gradient out as rows g, `[c, N T, p]`, in the order of `input_rows`."""

    def factor_sums(
        self, activation: Tensor, output_gradient: Tensor, *, positions_fraction: float = 1.0, seed: int = 0
    ) -> FactorSums:
        """Sums a a^T and g g^T over the rows of one call of the layer, without a host sync.

        Products are taken in float32, in float64 for float64 input, also under autocast. Memory is bounded by
        `TILE_BYTES` (or one example, if that is larger).

        Args:
            activation: The layer's input, examples first.
            output_gradient: Gradient of the loss with respect to the layer's output, examples first; not scaled here.
            positions_fraction: Share of the positions to use, in (0, 1]; drawn without replacement, the same ones for
                every example, and at least one. The sums are scaled so that their expectation is that of all positions.
            seed: Seed of that draw; the same seed draws the same positions in any process and on any device.

        Raises:
            ValueError: Shapes that don't belong to this layer or to each other, or a fraction outside (0, 1].
        """
        a, g = self.batched(activation, output_gradient)
        positions = self.positions(a)
        chosen = draw_positions(positions, positions_fraction, seed)
        used = positions if chosen is None else len(chosen)
        if chosen is not None:
            chosen = chosen.to(a.device, non_blocking=True)
        c, p, q = self.shape.groups, self.shape.d_out, self.shape.d_in - self.has_bias
        A = a.new_zeros(c, q, q, dtype=accumulation_dtype(a))
        G = g.new_zeros(c, p, p, dtype=accumulation_dtype(g))
        sums = a.new_zeros(c, q, dtype=A.dtype)
        tile = max(1, TILE_BYTES // max(1, c * used * (p + q) * A.dtype.itemsize))
        for start in range(0, len(a), tile):
            rows = self.input_rows(a[start : start + tile], chosen).to(A.dtype)
            A.baddbmm_(rows.mT, rows)  # in place: autocast leaves such products alone
            sums += rows.sum(1)
            rows = self.output_rows(g[start : start + tile], chosen).to(G.dtype)
            G.baddbmm_(rows.mT, rows)
        if chosen is not None:
            for estimate in (A, G, sums):
                estimate.mul_(positions / used)
        rows_in_all = len(a) * positions
        return FactorSums(A=with_homogeneous(A, sums, rows_in_all) if self.has_bias else A, G=G, rows=rows_in_all)

    def parameters(self) -> list[nn.Parameter]:
        """Returns the parameters of the block: the weight and, if it is part of the block, the bias."""
        return [self._weight] if self._bias is None else [self._weight, self._bias]

    def gradient(self) -> Tensor:
        """Returns the layer's gradient V as a fresh `[c, p, q]`, bias last, in float32 at least.

        Raises:
            ValueError: A parameter of the block has no gradient.
        """
        c, p = self.shape.groups, self.shape.d_out
        parts = [_gradient_of(self.name, "weight", self._weight).reshape(c, p, -1)]
        if self._bias is not None:
            parts.append(_gradient_of(self.name, "bias", self._bias).reshape(c, p, 1))
        joined = torch.cat(parts, dim=-1)
        return joined.to(torch.promote_types(joined.dtype, torch.float32))

    def write_gradient(self, direction: Tensor) -> None:
        """Overwrites the layer's gradients in place with `direction`.

        Args:
            direction: `[c, p, q]`, bias last.

        Raises:
            ValueError: Another shape, or a parameter without a gradient.
        """
        expected = (self.shape.groups, self.shape.d_out, self.shape.d_in)
        if tuple(direction.shape) != expected:
            raise ValueError(f"block {self.name}: direction has shape {tuple(direction.shape)}, must be {expected}")
        weight_gradient = _gradient_of(self.name, "weight", self._weight)
        if self._bias is not None:
            bias_gradient = _gradient_of(self.name, "bias", self._bias)
            bias_gradient.copy_(direction[..., -1].reshape(bias_gradient.shape))
            direction = direction[..., :-1]
        weight_gradient.copy_(direction.reshape(weight_gradient.shape))


def _gradient_of(block: BlockName, name: str, parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        raise ValueError(f"block {block}: its {name} has no gradient; call backward() before the preconditioner's step")
    return parameter.grad.detach()


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """Returns the dtype for products of `tensor`: float64 stays, everything else becomes float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def draw_positions(positions: int, fraction: float, seed: int) -> Tensor | None:
    """Draws a share of the positions 0..T-1 uniformly without replacement.

    Args:
        positions: Number of positions T.
        fraction: Share in (0, 1]; at least one position is drawn.
        seed: Seeds a generator of its own on the CPU.

    Returns:
        Sorted positions as int64 `[T']` on the CPU, or None for all of them.

    Raises:
        ValueError: `fraction` is outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"positions_fraction is {fraction}, must be in (0, 1]")
    count = max(1, round(fraction * positions))
    if count >= positions:
        return None
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return torch.randperm(positions, generator=generator)[:count].sort().values


def with_homogeneous(second_moment: Tensor, sums: Tensor, rows: int) -> Tensor:
    """Borders a sum of a a^T with the homogeneous coordinate, as if every row a ended in a 1.

    Args:
        second_moment: `[c, d, d]`.
        sums: Sum of the rows, `[c, d]`.
        rows: Number of rows.

    Returns:
        `[c, d + 1, d + 1]`.
    """
    c, d, _ = second_moment.shape
    bordered = second_moment.new_empty(c, d + 1, d + 1)
    bordered[:, :d, :d] = second_moment
    bordered[:, :d, d] = sums
    bordered[:, d, :d] = sums
    bordered[:, d, d].fill_(rows)
    return bordered

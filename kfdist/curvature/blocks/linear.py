"""Fully connected layers (K-FAC, Martens & Grosse, arXiv 1503.05671; sequences by expand, arXiv 2311.00636)."""

from torch import Tensor, nn

from kfdist.curvature.blocks.base import Block
from kfdist.types import BlockName, BlockShape


class LinearBlock(Block):
    """Block of an `nn.Linear` on inputs `[N, ..., d]`; the dimensions between are positions that share the weight.

    A single example without its dimension, `[d]`, is taken as N = 1.
    """

    def __init__(self, name: BlockName, module: nn.Linear) -> None:
        super().__init__(name, module)
        self.shape = BlockShape(d_out=module.out_features, d_in=module.in_features + self.has_bias)

    def batched(self, activation: Tensor, output_gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Returns both as `[N, T, features]`; see `Block.batched`."""
        a = self._with_positions(activation, self.shape.d_in - self.has_bias, "activation")
        g = self._with_positions(output_gradient, self.shape.d_out, "output gradient")
        if a.shape[:2] != g.shape[:2]:
            raise ValueError(
                f"block {self.name}: activation {tuple(activation.shape)} and output gradient "
                f"{tuple(output_gradient.shape)} differ in examples or positions; both must be from the same call"
            )
        return a, g

    def positions(self, activation: Tensor) -> int:
        """Returns T of `[N, T, features]`."""
        return activation.shape[1]

    def input_rows(self, activation: Tensor, chosen: Tensor | None = None) -> Tensor:
        """Returns `[1, N T, features]`; see `Block.input_rows`."""
        return _rows(activation, chosen)

    def output_rows(self, output_gradient: Tensor, chosen: Tensor | None = None) -> Tensor:
        """Returns `[1, N T, features]`; see `Block.output_rows`."""
        return _rows(output_gradient, chosen)

    def _with_positions(self, tensor: Tensor, features: int, what: str) -> Tensor:
        if tensor.dim() == 0 or tensor.shape[-1] != features:
            raise ValueError(
                f"block {self.name}: {what} has shape {tuple(tensor.shape)}, must be [N, ..., {features}]; "
                "was the layer replaced or resized?"
            )
        tensor = tensor.detach()
        if tensor.dim() == 1:
            tensor = tensor.unsqueeze(0)
        if tensor.dim() == 2:
            return tensor.unsqueeze(1)
        return tensor.flatten(1, -2)


def _rows(tensor: Tensor, chosen: Tensor | None) -> Tensor:
    if chosen is not None:
        tensor = tensor.index_select(1, chosen)
    return tensor.flatten(0, 1).unsqueeze(0)

"""Fully connected layers (K-FAC, Martens & Grosse, arXiv 1503.05671; sequences by expand, arXiv 2311.00636)."""

import torch
from torch import Tensor, nn

from kfdist.curvature.blocks.base import Block, accumulation_dtype, draw_positions, with_homogeneous
from kfdist.curvature.statistics import FactorSums
from kfdist.types import BlockName, BlockShape


class LinearBlock(Block):
    """Block of an `nn.Linear` on inputs `[N, ..., d]`; the dimensions between are positions that share the weight.

    A single example without its dimension, `[d]`, is taken as N = 1.
    """

    def __init__(self, name: BlockName, module: nn.Linear) -> None:
        super().__init__(name, module)
        self.shape = BlockShape(d_out=module.out_features, d_in=module.in_features + self.has_bias)

    def factor_sums(
        self, activation: Tensor, output_gradient: Tensor, *, positions_fraction: float = 1.0, seed: int = 0
    ) -> FactorSums:
        """Sums a a^T and g g^T over examples and positions; see `Block.factor_sums`."""
        a = self._rows(activation, self.shape.d_in - self.has_bias, "activation")
        g = self._rows(output_gradient, self.shape.d_out, "output gradient")
        if a.shape[:2] != g.shape[:2]:
            raise ValueError(
                f"block {self.name}: activation {tuple(activation.shape)} and output gradient "
                f"{tuple(output_gradient.shape)} differ in examples or positions; both must be from the same call"
            )
        rows, scale = a.shape[0] * a.shape[1], 1.0
        chosen = draw_positions(a.shape[1], positions_fraction, seed)
        if chosen is not None:
            scale = a.shape[1] / len(chosen)
            chosen = chosen.to(a.device, non_blocking=True)
            a, g = a.index_select(1, chosen), g.index_select(1, chosen)
        with torch.autocast(a.device.type, enabled=False):
            a = a.flatten(0, 1).to(accumulation_dtype(a))
            g = g.flatten(0, 1).to(accumulation_dtype(g))
            A, G = (a.mT @ a).unsqueeze(0) * scale, (g.mT @ g).unsqueeze(0) * scale
            if self.has_bias:
                A = with_homogeneous(A, a.sum(0).unsqueeze(0) * scale, rows)
        return FactorSums(A=A, G=G, rows=rows)

    def _rows(self, tensor: Tensor, features: int, what: str) -> Tensor:
        """Returns `[N, T, features]`."""
        if tensor.dim() == 0 or tensor.shape[-1] != features:
            raise ValueError(
                f"block {self.name}: {what} has shape {tuple(tensor.shape)}, must be [N, ..., {features}]; "
                "was the layer replaced or resized?"
            )
        tensor = tensor.detach()
        if tensor.dim() == 1:
            tensor = tensor.unsqueeze(0)
        return tensor.reshape(tensor.shape[0], -1, features) if tensor.numel() else tensor.reshape(0, 1, features)

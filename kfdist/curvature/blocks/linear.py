"""Fully connected layers (K-FAC, Martens & Grosse, arXiv 1503.05671), also over sequences (arXiv 2311.00636)."""

from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor, nn
from typing_extensions import override

from kfdist.curvature.blocks.base import Operation, ParameterPart
from kfdist.curvature.blocks.layer_block import LayerBlock
from kfdist.curvature.blocks.rows import accumulation_dtype
from kfdist.linalg.uploads import sent
from kfdist.types import BlockName, BlockShape, WeightSharing


class LinearBlock(LayerBlock):
    """Block of a matrix that multiplies inputs `[N, ..., d]`; dimensions between are positions that share the weight.

    A single example without its dimension, `[d]`, is taken as N = 1.

    `sharing` says how T positions enter the factors (algorithms.md 7.9). `expand`: each one is a separate row, right
    where every position has its own loss. `reduce`: an example has one row, the mean of its a and the sum of its
    g, right where positions are pooled before the loss, and cheaper; all positions are used then, since a sample of
    them would be no unbiased estimate. Gradients and the rows of single examples are the same either way.
    """

    operation = Operation("linear")
    maskable = True

    def __init__(
        self,
        name: BlockName,
        module: nn.Module,
        weight: ParameterPart,
        bias: ParameterPart | None,
        *,
        layer: str | None = None,
        sharing: WeightSharing = "expand",
    ) -> None:
        super().__init__(name, module, weight, bias, layer)
        *stack, d_out, d_in = self.weight.shape
        self.shape = BlockShape(d_out=d_out, d_in=d_in + self.homogeneous, groups=stack[0] if stack else 1)
        self._reduces = sharing == "reduce"

    @override
    def batched(
        self, activation: Float[Tensor, "..."], output_gradient: Float[Tensor, "..."]
    ) -> tuple[Float[Tensor, "N T q"], Float[Tensor, "N T p"]]:
        a = self._with_positions(activation, self.shape.d_in - self.homogeneous, "activation")
        g = self._with_positions(output_gradient, self.shape.d_out, "output gradient")
        if a.shape[:2] != g.shape[:2]:
            raise ValueError(
                f"block {self.name}: activation {tuple(activation.shape)} and output gradient "
                f"{tuple(output_gradient.shape)} differ in examples or positions; both must be from the same call"
            )
        return a, g

    @override
    def positions(
        self, activation: Shaped[Tensor, "N T q"], output_gradient: Float[Tensor, "N T p"] | None = None
    ) -> int:
        del output_gradient
        return 1 if self._reduces else activation.shape[1]

    @override
    def pooled(
        self,
        activation: Float[Tensor, "N T q"],
        output_gradient: Float[Tensor, "N T p"],
        kept: Bool[Tensor, "N T"] | None = None,
    ) -> tuple[Float[Tensor, "N R q"], Float[Tensor, "N R p"], Bool[Tensor, "N R"] | None]:
        """Under `reduce`, returns the mean of a and the sum of g over the positions that count.

        An example without any has no row either.
        """
        if not self._reduces:
            return activation, output_gradient, kept
        a = activation.sum(1, keepdim=True, dtype=accumulation_dtype(activation))
        if kept is None:
            a = a / max(1, activation.shape[1])
        else:
            a = a / kept.sum(1, dtype=a.dtype).clamp_min(1)[:, None, None]
            kept = kept.any(1, keepdim=True)
        return a, output_gradient.sum(1, keepdim=True, dtype=accumulation_dtype(output_gradient)), kept

    @override
    def input_windows(
        self, padded: Float[Tensor, "N T q"], chosen: Int64[Tensor, " used"] | None = None
    ) -> Float[Tensor, "1 N _ q"]:
        return _windows(padded, chosen)

    @override
    def output_windows(
        self, output_gradient: Float[Tensor, "N T p"], chosen: Int64[Tensor, " used"] | None = None
    ) -> Float[Tensor, "1 N _ p"]:
        return _windows(output_gradient, chosen)

    @override
    def drawn_inputs(
        self, activation: Float[Tensor, "N T q"], output_gradient: Float[Tensor, "N T p"], chosen: Int64[Tensor, " r"]
    ) -> tuple[Float[Tensor, "1 r q"], None]:
        return _drawn(activation, chosen), None

    @override
    def drawn_outputs(
        self, output_gradient: Float[Tensor, "N T p"], chosen: Int64[Tensor, " r"]
    ) -> Float[Tensor, "1 r p"]:
        return _drawn(output_gradient, chosen)

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


def _windows(tensor: Tensor, chosen: Tensor | None) -> Tensor:
    if chosen is not None:
        tensor = tensor.index_select(1, chosen)
    return tensor.unsqueeze(0)


def _drawn(tensor: Tensor, chosen: Tensor) -> Tensor:
    """Copies rows of `[N, T, d]`, which may lie in any order."""
    chosen = sent(chosen, tensor.device)
    if tensor.is_contiguous():
        return tensor.view(-1, tensor.shape[-1]).index_select(0, chosen).unsqueeze(0)
    positions = tensor.shape[1]
    return tensor[chosen // positions, chosen % positions].unsqueeze(0)

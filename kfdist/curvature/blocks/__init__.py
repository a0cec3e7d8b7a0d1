"""What each kind of layer contributes to the curvature. `BLOCKS` is the only table of supported layers."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from kfdist.curvature.blocks.base import Block as Block
from kfdist.curvature.blocks.conv import ConvBlock, ConvTransposeBlock
from kfdist.curvature.blocks.linear import LinearBlock
from kfdist.types import BlockName, WeightSharing

BLOCKS: dict[type[nn.Module], Callable[[BlockName, Any], Block]] = {
    nn.Linear: LinearBlock,
    nn.Conv1d: ConvBlock,
    nn.Conv2d: ConvBlock,
    nn.Conv3d: ConvBlock,
    nn.ConvTranspose1d: ConvTransposeBlock,
    nn.ConvTranspose2d: ConvTransposeBlock,
    nn.ConvTranspose3d: ConvTransposeBlock,
}


def make_block(name: str, module: nn.Module, sharing: WeightSharing = "expand") -> Block | str:
    """Makes the block of a layer.

    Args:
        name: Dotted module name.
        module: The layer.
        sharing: How the positions of a sequence enter the factors of a `Linear` (see `LinearBlock`). Convolutions
            always expand: that is KFC.

    Returns:
        The block, or the reason why the layer has none: its parameters then keep their plain gradients.
    """
    kind = type(module).__name__
    base = next((known for known in BLOCKS if isinstance(module, known)), None)
    if base is None:
        return f"{kind} has no block; supported are {', '.join(known.__name__ for known in BLOCKS)}"
    reason = _reason_against(module, base)
    if reason:
        return f"{kind}: {reason}"
    if isinstance(module, nn.Linear):
        return LinearBlock(name, module, sharing)
    return BLOCKS[base](name, module)


def _reason_against(module: nn.Module, base: type[nn.Module]) -> str:
    """Returns why a module of a supported kind can't have a block, or nothing."""
    if type(module).forward is not base.forward:
        return f"it replaces {base.__name__}.forward, so its block isn't known to be right"
    if type(module) is nn.modules.linear.NonDynamicallyQuantizableLinear:
        return "attention uses its weight without calling it, so nothing can be captured"
    weight, bias = module.weight, module.bias
    for label, parameter in (("weight", weight), ("bias", bias)):
        if parameter is None and label == "bias":
            continue
        if isinstance(parameter, UninitializedParameter):
            return "it is lazy and not yet initialised; run one forward pass first"
        if not isinstance(parameter, nn.Parameter):
            return f"its {label} is computed (a parametrization?), not a parameter with a gradient of its own"
        if type(parameter.data) is not Tensor or parameter.is_sparse:
            return f"its {label} is a {type(parameter.data).__name__}, not a plain dense tensor"
        if parameter.is_meta:
            return f"its {label} is on the meta device and has no values"
        if not parameter.is_floating_point():
            return f"its {label} is {parameter.dtype}, not a real floating-point type"
        if parameter.numel() == 0:
            return f"its {label} is empty"
    if not weight.requires_grad:
        return "its weight is frozen (requires_grad is False)"
    return ""

"""What each kind of layer contributes to the curvature. `KINDS` is the only table of supported layers."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from kfdist.curvature.blocks.bare import Use, bare_matrices, bare_tables, wide_parameters
from kfdist.curvature.blocks.bare import held_matrices as held_matrices
from kfdist.curvature.blocks.bare import multiplied_weights as multiplied_weights
from kfdist.curvature.blocks.base import Block as Block
from kfdist.curvature.blocks.base import Operation as Operation
from kfdist.curvature.blocks.base import ParameterPart as ParameterPart
from kfdist.curvature.blocks.base import note_shared as note_shared
from kfdist.curvature.blocks.conv import ConvBlock, ConvTransposeBlock
from kfdist.curvature.blocks.embedding import BAGS
from kfdist.curvature.blocks.embedding import EmbeddingBlock as EmbeddingBlock
from kfdist.curvature.blocks.experts import ExpertsBlock
from kfdist.curvature.blocks.layer_block import LayerBlock as LayerBlock
from kfdist.curvature.blocks.linear import LinearBlock
from kfdist.curvature.blocks.units import Role
from kfdist.curvature.blocks.units import UnitBlock as UnitBlock
from kfdist.curvature.blocks.whole import TensorBlock as TensorBlock
from kfdist.types import BlockName, WeightSharing

_Maker = Callable[[BlockName, Any, WeightSharing, bool], Sequence[Block]]
"""Makes the blocks of a module, given its name, how positions enter, and whether biases are part of them."""


def _linear(name: BlockName, module: nn.Linear, sharing: WeightSharing, biased: bool) -> Sequence[Block]:
    return [LinearBlock(name, module, ParameterPart.weight_of(module), _bias(module, biased), sharing=sharing)]


def _transposed_linear(name: BlockName, module: Any, sharing: WeightSharing, biased: bool) -> Sequence[Block]:
    weight = ParameterPart.weight_of(module, transposed=True)
    return [LinearBlock(name, module, weight, _bias(module, biased), sharing=sharing)]


def _attention(name: BlockName, module: nn.MultiheadAttention, sharing: WeightSharing, biased: bool) -> Sequence[Block]:
    """Makes a block of each of the projections to queries, keys and values, packed in one parameter or apart."""
    width, bias, packed = module.embed_dim, module.in_proj_bias, module.in_proj_weight
    blocks = []
    for number, which in enumerate("qkv"):
        rows, label = slice(number * width, (number + 1) * width), f"{which}_proj"
        weight = (
            ParameterPart("in_proj_weight", packed, rows)
            if packed is not None
            else ParameterPart(f"{label}_weight", getattr(module, f"{label}_weight"))
        )
        part = ParameterPart("in_proj_bias", bias, rows) if biased and bias is not None and bias.requires_grad else None
        full = f"{name}.{label}" if name else label
        blocks.append(LinearBlock(full, module, weight, part, layer=name, sharing=sharing))
    return blocks


def _recurrent(name: BlockName, module: nn.Module, _sharing: WeightSharing, biased: bool) -> Sequence[Block]:
    """Makes a block of each matrix of a recurrent layer or cell, with its bias; time steps are positions."""
    blocks = []
    for attribute, weight in module.named_parameters(recurse=False):
        if attribute.startswith("weight"):
            label = attribute.replace("weight", "bias", 1)
            bias = getattr(module, label, None)
            part = (
                ParameterPart(label, bias) if isinstance(bias, nn.Parameter) and biased and bias.requires_grad else None
            )
            full = f"{name}.{attribute}".lstrip(".")
            blocks.append(LinearBlock(full, module, ParameterPart(attribute, weight), part, layer=name))
    return blocks


def _bare(
    name: BlockName, module: nn.Module, sharing: WeightSharing, biased: bool, uses: Mapping[str, Use] | None = None
) -> Sequence[Block]:
    """Makes a block of each matrix or table that a module uses by itself; a bias belongs to one called "weight".

    Others use those of a list of parameters: `uses` says how.
    """
    blocks = []
    for attribute, use in (bare_matrices(module) if uses is None else uses).items():
        kind, _, fold = use.partition(", folded after ")
        parameter = getattr(module, attribute)
        if fold and not parameter.is_contiguous():
            continue
        weight = ParameterPart(attribute, parameter, transposed=kind != "matrix", fold=int(fold) if fold else None)
        full = name if attribute == "weight" else f"{name}.{attribute}".lstrip(".")
        if use == "table":
            blocks.append(EmbeddingBlock(full, module, weight, layer=name))
            continue
        if parameter.dim() == 3 and not fold:
            blocks.append(ExpertsBlock(full, module, weight, layer=name))
            continue
        own = attribute == "weight" and isinstance(getattr(module, "bias", None), nn.Parameter)
        bias = _bias(module, biased and module.bias.shape == weight.of(weight.parameter).shape[:1]) if own else None
        blocks.append(LinearBlock(full, module, weight, bias, layer=name, sharing=sharing))
        blocks[-1].looked_up = attribute in bare_tables(module)
    return blocks


def _conv(name: BlockName, module: Any, _sharing: WeightSharing, biased: bool) -> Sequence[Block]:
    return [ConvBlock(name, module, _bias(module, biased))]


def _transposed_conv(name: BlockName, module: Any, _sharing: WeightSharing, biased: bool) -> Sequence[Block]:
    return [ConvTransposeBlock(name, module, _bias(module, biased))]


def _units(name: BlockName, module: Any, _sharing: WeightSharing, biased: bool) -> Sequence[Block]:
    """Makes the block of a norm's scale and shift, or of the one of them that is trained."""
    roles: dict[str, Role] = {"weight": "scale", "bias": "shift"} if biased else {"weight": "scale"}
    given = {label: getattr(module, label, None) for label in roles}
    parts = [ParameterPart(label, each) for label, each in given.items() if each is not None and each.requires_grad]
    return [UnitBlock(name, module, parts, [roles[part.attribute] for part in parts])] if parts else []


def _table(name: BlockName, module: Any, _sharing: WeightSharing, _biased: bool) -> Sequence[Block]:
    bag = module.mode if isinstance(module, nn.EmbeddingBag) else None
    return [EmbeddingBlock(name, module, ParameterPart.weight_of(module, transposed=True), bag)]


KINDS: dict[type[nn.Module] | str, _Maker] = {
    nn.Linear: _linear,
    nn.Conv1d: _conv,
    nn.Conv2d: _conv,
    nn.Conv3d: _conv,
    nn.ConvTranspose1d: _transposed_conv,
    nn.ConvTranspose2d: _transposed_conv,
    nn.ConvTranspose3d: _transposed_conv,
    nn.MultiheadAttention: _attention,
    nn.RNNBase: _recurrent,
    nn.RNNCellBase: _recurrent,
    "transformers.pytorch_utils.Conv1D": _transposed_linear,
    nn.BatchNorm1d: _units,
    nn.BatchNorm2d: _units,
    nn.BatchNorm3d: _units,
    nn.SyncBatchNorm: _units,
    nn.InstanceNorm1d: _units,
    nn.InstanceNorm2d: _units,
    nn.InstanceNorm3d: _units,
    nn.LayerNorm: _units,
    nn.GroupNorm: _units,
    nn.RMSNorm: _units,
    nn.Embedding: _table,
    nn.EmbeddingBag: _table,
}
"""By class, or by its full name where it is another library's."""

TABLES = (nn.Embedding, nn.EmbeddingBag)
"""Modules that look rows of their weight up by number."""

OPAQUE = (nn.utils.parametrize.ParametrizationList,)
"""Modules that have no block."""

WITHOUT_UNITS = (*OPAQUE, *TABLES, nn.RNNBase, nn.RNNCellBase)
"""Modules whose parameters neither scale nor shift."""

SUPPORTED = ", ".join(kind if isinstance(kind, str) else kind.__name__ for kind in KINDS)
"""The classes in words; besides them, matrices that a module's own code multiplies with."""


def make_blocks(
    name: str,
    module: nn.Module,
    sharing: WeightSharing = "expand",
    *,
    biased: bool = True,
    held: Use | None = None,
) -> Sequence[Block] | str:
    """Makes the blocks of a layer.

    Args:
        name: Dotted module name.
        module: The layer.
        sharing: How the positions of a sequence enter the factors of a `Linear` (see `LinearBlock`). Convolutions
            always expand: that is KFC.
        biased: Whether a bias is part of its weight's block; not so where layers share a weight and not the bias.
        held: How others use its parameters, if it is a list or dictionary of them; see `held_matrices`.

    Returns:
        The blocks, none where the layer is of another kind; or the reason why it can't have any.
    """
    kind, maker = type(module).__name__, _maker(module)
    if held is not None and wide_parameters(module):
        maker = partial(_bare, uses=dict.fromkeys(wide_parameters(module), held))
    if isinstance(module, OPAQUE):
        return f"{kind} has no block: its layer multiplies with what the parametrization makes of it"
    if maker is None:
        return []
    reason = _reason_against(module)
    if reason:
        return f"{kind}: {reason}"
    trained = [block for block in maker(name, module, sharing, biased) if block.parts[0].parameter.requires_grad]
    return trained or f"{kind}: its weight is frozen (requires_grad is False)"


def head_of(table: EmbeddingBlock, sharing: WeightSharing) -> LinearBlock:
    """Makes the block of a table's weight as the matrix that a head multiplies with (docs/decisions/0018)."""
    part = table.parts[0]
    weight = ParameterPart(part.attribute, part.parameter)
    head = LinearBlock(table.name, table.module, weight, None, layer=table.layer, sharing=sharing)
    head.looked_up = True
    return head


def make_bare_block(name: str, layer: str, module: nn.Module, attribute: str) -> UnitBlock | str:
    """Makes the block of a parameter that no other block has: what it does to its units is seen when it is used.

    Args:
        name: The parameter's dotted name.
        layer: Its module's.
        module: That module.
        attribute: The parameter's name in it.

    Returns:
        The block, or the reason why there is none.
    """
    parameter = getattr(module, attribute)
    if not parameter.requires_grad:
        return "it is frozen (requires_grad is False)"
    reason = _reason_against_parameter(attribute, parameter)
    return reason or UnitBlock(name, module, [ParameterPart(attribute, parameter)], ["either"], layer)


def make_tensor_block(name: str, layer: str, module: nn.Module, attribute: str, *, most: int) -> TensorBlock | str:
    """Makes the block of a whole parameter, for methods that take its gradient and ask for nothing else.

    Args:
        name: The parameter's dotted name.
        layer: Its module's.
        module: That module.
        attribute: The parameter's name in it.
        most: Longest dimension that isn't cut.

    Returns:
        The block, or the reason why there is none.
    """
    parameter = getattr(module, attribute)
    if not parameter.requires_grad:
        return "it is frozen (requires_grad is False)"
    if isinstance(module, TABLES) and module.sparse:
        return "its gradients are sparse; make the embedding with sparse=False"
    reason = _reason_against_parameter(attribute, parameter)
    return reason or TensorBlock(name, module, ParameterPart(attribute, parameter), layer, most=most)


def _maker(module: nn.Module) -> _Maker | None:
    for base in type(module).__mro__:
        known = KINDS.get(base) or KINDS.get(f"{base.__module__}.{base.__qualname__}")
        if known is not None:
            return known
    return _bare if bare_matrices(module) else None


def _bias(module: nn.Module, biased: bool) -> ParameterPart | None:
    """Returns a module's bias as a part of its weight's block; a frozen one isn't part of it."""
    bias = module.bias
    return ParameterPart("bias", bias) if biased and isinstance(bias, nn.Parameter) and bias.requires_grad else None


def _reason_against(module: nn.Module) -> str:
    """Returns why a module of a supported kind can't have blocks, or nothing."""
    if isinstance(module, TABLES):
        for setting in ("max_norm", "scale_grad_by_freq"):
            value = getattr(module, setting)
            if value:
                return f"with {setting} = {value} a row's gradient isn't that of its loss at its values"
        if isinstance(module, nn.EmbeddingBag) and module.mode not in BAGS:
            return f"mode = {module.mode!r} has no input whose product with the weight it is; sum and mean have"
    for label in ("weight", "bias"):
        parameter = getattr(module, label, None)
        if isinstance(parameter, Tensor) and not isinstance(parameter, nn.Parameter):
            return f"its {label} is computed (a parametrization?), not a parameter with a gradient of its own"
    reasons = (_reason_against_parameter(label, each) for label, each in module.named_parameters(recurse=False))
    return next(filter(None, reasons), "")


def _reason_against_parameter(label: str, parameter: nn.Parameter) -> str:
    if isinstance(parameter, UninitializedParameter):
        return "it is lazy and not yet initialised; run one forward pass first"
    if type(parameter.data) is not Tensor or parameter.is_sparse:
        return f"its {label} is a {type(parameter.data).__name__}, not a plain dense tensor"
    if not parameter.is_floating_point():
        return f"its {label} is {parameter.dtype}, not a real floating-point type"
    if parameter.numel() == 0:
        return f"its {label} is empty"
    return ""

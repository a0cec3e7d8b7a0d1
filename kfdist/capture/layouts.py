"""Which layers see their examples along dim 1, as time-first models have them.

A module with `batch_first=False` takes them there, and so does `nn.MultiheadAttention` inside, whatever it is given.
What the modules of a forward were given says where its tensors have them (`ForwardPass.is_turned`); a square one, with
as many time steps as examples, has them along dim 0, but inside of such modules.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from torch import nn

from kfdist.curvature.blocks import Block

Layout = Literal["examples first", "positions first", "as its module is given"]
"""How a layer's inputs lie: always with examples first, in a recurrent layer as it is measured; always with positions
first, inside of an attention with `batch_first`; with positions first where the module around it is given them so."""

_STACKS = (nn.TransformerEncoder, nn.TransformerDecoder)
_LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


def layouts_of(model: nn.Module, blocks: Iterable[Block]) -> Mapping[str, Layout]:
    """Returns the layouts that are known by the modules around blocks, by block."""
    found: dict[int, Layout] = {}
    for module in model.modules():  # those inside come after those around them
        if isinstance(module, (*_STACKS, *_LAYERS, nn.MultiheadAttention)) and not _takes_examples_first(module):
            found |= dict.fromkeys(map(id, module.modules()), "as its module is given")
        elif isinstance(module, nn.MultiheadAttention):
            found |= dict.fromkeys(map(id, module.modules()), "positions first")
        elif isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
            found[id(module)] = "examples first"
    return {block.name: found[id(block.module)] for block in blocks if id(block.module) in found}


def _takes_examples_first(module: Any) -> bool:
    if isinstance(module, _STACKS):
        return not len(module.layers) or _takes_examples_first(module.layers[0])
    if isinstance(module, _LAYERS):
        return _takes_examples_first(module.self_attn)
    return getattr(module, "batch_first", True) is not False

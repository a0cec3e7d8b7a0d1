"""Which parameters methods on gradients take: whole ones, whatever module they are of and however it uses them."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn
from torch.nn.parameter import UninitializedParameter

from kfdist.curvature.blocks import TensorBlock, make_tensor_block
from kfdist.curvature.gradient_inverter import AbstractGradientInverter
from kfdist.runtime.plan.coverage import SCALAR, SKIPPED, VECTOR


@dataclass
class WholeParameters:
    """What methods on gradients have.

    Attributes:
        blocks: Their blocks, each with its method and the glob that chose it, in the model's order.
        reasons: Why other parameters that the globs give them have no block, by dotted name.
        taken: Ids of all of these parameters: no other method has a block of them.
        names: Of all of these parameters, as their globs and `skip` have them.
    """

    blocks: list[tuple[TensorBlock, AbstractGradientInverter, str]] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    taken: set[int] = field(default_factory=set)
    names: list[str] = field(default_factory=list)

    def has_part_of(self, module: nn.Module) -> bool:
        """Whether one of a module's own parameters is among them."""
        return any(id(parameter) in self.taken for parameter in module.parameters(recurse=False))


def whole_parameters(
    layers: Iterable[tuple[str, nn.Module]],
    patterns: Mapping[str, object],
    covers: Callable[[str, str], bool],
    *,
    skipped: Callable[[str], bool],
) -> WholeParameters:
    """Makes the blocks of methods on gradients, one per parameter.

    Args:
        layers: Modules by name that may have blocks.
        patterns: Methods by glob; the first that covers a parameter's dotted name has it.
        covers: Says whether a glob covers a name.
        skipped: Says whether the user leaves a name out.
    """
    found = WholeParameters()
    if not any(isinstance(each, AbstractGradientInverter) for each in patterns.values()):
        return found
    for layer, module, attribute, parameter in _own_parameters(layers):
        name = f"{layer}.{attribute}".lstrip(".")
        pattern = next((glob for glob in patterns if covers(glob, name)), "")
        inverter = patterns.get(pattern)
        if id(parameter) in found.taken or not isinstance(inverter, AbstractGradientInverter):
            continue
        found.taken.add(id(parameter))
        found.names.append(name)
        if reason := SKIPPED if skipped(name) else _too_few_dimensions(parameter, inverter):
            found.reasons[name] = reason
            continue
        block = make_tensor_block(name, layer, module, attribute, most=inverter.block_size)
        if isinstance(block, str):
            found.reasons[name] = block
        else:
            found.blocks.append((block, inverter, pattern))
    return found


def _too_few_dimensions(parameter: nn.Parameter, inverter: AbstractGradientInverter) -> str:
    """Returns why a method doesn't take a single number or a vector; nothing of a lazy one, of no dimensions yet."""
    if isinstance(parameter, UninitializedParameter):
        return ""
    if parameter.dim() == 0:
        return SCALAR
    return VECTOR if parameter.dim() == 1 and not inverter.vectors else ""


def _own_parameters(
    layers: Iterable[tuple[str, nn.Module]],
) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    for layer, module in layers:
        for attribute, parameter in module.named_parameters(recurse=False):
            yield layer, module, attribute, parameter

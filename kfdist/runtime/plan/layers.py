"""The layers of a model by name, without the parts that wrappers add, and whether they still are what they were."""

from collections.abc import Iterable, Iterator, Set

import torch
from torch import nn

from kfdist.curvature.blocks import Block
from kfdist.errors import ConfigError, ModelChanged
from kfdist.torch_internals import children_by_name, parameters_by_name, runs_compiled

_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module")
"""Where torch.compile's and the activation checkpoint wrapper keep the module that they wrap."""

SHARDED = "kfdist needs whole-layer gradients: use DistributedDataParallel, or kfdist's own GradientReducer"
"""What to do instead of sharding a model's layers."""


def check_model(model: object) -> None:
    """Refuses what is no module, such as the parameters that other optimizers take, by `ConfigError`."""
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"is a {type(model).__name__} and must be the model itself, an nn.Module: curvature is measured in its "
            "layers. kfdist.Optimizer takes parameters, or groups of them, as `params` beside it",
            path="model",
        )


def bare_model(model: nn.Module) -> nn.Module:
    """Strips the wrappers of torch.compile, DistributedDataParallel and activation checkpointing, in any order.

    Raises:
        ConfigError: The model is wrapped by something that splits its layers or copies them to other devices.
    """
    while True:
        if type(model).__name__ == "FullyShardedDataParallel":
            raise ConfigError(f"the model is wrapped by FullyShardedDataParallel, which shards its layers; {SHARDED}")
        if isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
            raise ConfigError(
                "the model is wrapped by DataParallel over several devices, whose copies of the layers "
                "can't be measured; use DistributedDataParallel with one process a device"
            )
        # Looked up as children: a model that passes attributes on to a part of it is no wrapper.
        children = children_by_name(model)
        inner = next((children[key] for key in _WRAPPED if key in children), None)
        if inner is None and isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            inner = model.module
        if inner is None:
            return model
        model = inner


def is_compiled(model: nn.Module) -> bool:
    """Says whether torch.compile made the model or a part of it, as far as the modules show."""
    return any("_orig_mod" in children_by_name(module) or runs_compiled(module) for module in model.modules())


def named_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields every module once, in the model's order, bare and by its dotted name without the wrappers' parts."""
    seen: set[int] = set()

    def visit(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
        module = bare_model(module)
        if id(module) in seen:
            return
        seen.add(id(module))
        yield name, module
        for child_name, child in module.named_children():
            yield from visit(child, f"{name}.{child_name}" if name else child_name)

    yield from visit(model, "")


def bare_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yields every parameter, a shared one several times, by its dotted name without the wrappers' parts."""
    for layer, module in named_layers(model):
        yield from module.named_parameters(layer, recurse=False)


def find_layer(model: nn.Module, name: str, found: dict[str, nn.Module | None] | None = None) -> nn.Module | None:
    """Returns what `named_layers` calls `name` now, or None.

    Args:
        model: The model.
        name: The layer's.
        found: Layers by name that were found already, to which those on the way to this one are added.
    """
    found = {} if found is None else found
    if name not in found:
        before, _, last = name.rpartition(".")
        parent = find_layer(model, before, found) if name else None
        child = model if not name else None if parent is None else children_by_name(parent).get(last)
        found[name] = None if child is None else bare_model(child)
    return found[name]


class StandingBlocks:
    """Does at each step what `check_blocks` does, which walks through the model, as a look at what it found before.

    Args:
        model: The model.
        blocks: Its blocks.
        device: Where the model was when the blocks were made.
    """

    def __init__(self, model: nn.Module, blocks: Iterable[Block], device: torch.device) -> None:
        self._model = model
        self._blocks = list(blocks)
        self._device = device
        self._children: list[tuple[nn.Module, str, nn.Module]] | None = None
        self._parameters: list[tuple[nn.Module, str, nn.Parameter, torch.Size, torch.dtype]] = []
        self._left_out: list[tuple[nn.Parameter, torch.Size]] = []
        self._kept: list[bool] = []

    def check(self) -> None:
        """Refuses a layer that was replaced, resized, moved or converted; it may be frozen and thawed.

        Raises:
            ModelChanged: With the layer's name.
        """
        if self._stand():
            return
        check_blocks(self._model, self._blocks, self._device)
        layers = {id(block.module) for block in self._blocks}
        self._children = list(_ways_to(self._model, layers))
        self._parameters = [
            (block.module, part.attribute, part.parameter, part.parameter.shape, part.parameter.dtype)
            for block in self._blocks
            for part in block.parts
        ]
        self._left_out = [
            (part.parameter, part.parameter.shape)
            for block in self._blocks
            for part in block.planned_parts[len(block.parts) :]
        ]
        self._kept = [block.has_bias for block in self._blocks]

    def _stand(self) -> bool:
        """Says whether all is as `check_blocks` last found it; where it isn't, or that isn't known, it looks again."""
        if self._children is None or [block.has_bias for block in self._blocks] != self._kept:
            return False
        for parent, name, child in self._children:
            if children_by_name(parent).get(name) is not child:
                return False
        device = self._device
        for module, name, parameter, shape, dtype in self._parameters:
            if parameters_by_name(module).get(name) is not parameter:
                return False
            if parameter.shape != shape or parameter.device != device or parameter.dtype != dtype:
                return False
        return all([parameter.shape == shape for parameter, shape in self._left_out])  # `resized` looks at these


def _ways_to(model: nn.Module, layers: Set[int]) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Yields the steps from module to child that lead to some layers, each once; layers are given by their ids."""
    seen: dict[int, bool] = {}

    def visit(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
        seen[id(module)] = id(module) in layers
        for name, child in children_by_name(module).items():
            if child is None:
                continue
            if id(child) not in seen:
                yield from visit(child)
            if seen[id(child)]:
                seen[id(module)] = True
                yield module, name, child

    yield from visit(model)


def check_blocks(model: nn.Module, blocks: Iterable[Block], device: torch.device) -> None:
    """Refuses, by `ModelChanged`, a layer that was replaced, resized, moved or converted since its block was made.

    Args:
        model: The model as it is now.
        blocks: Its blocks.
        device: Where the model was when the blocks were made.
    """
    found: dict[str, nn.Module | None] = {}
    for block in blocks:
        _check_block(find_layer(model, block.layer, found), block, device)


def _check_block(module: nn.Module | None, block: Block, device: torch.device) -> None:
    parameters = block.parameters()
    change = None
    if module is not block.module:
        change = "replaced or removed"
    elif any(getattr(module, part.attribute) is not part.parameter for part in block.parts):
        change = "given other parameters (replaced or resized)"
    elif block.resized:
        change = "resized"
    elif any(parameter.device != device for parameter in parameters):
        change = f"moved from {device} to {parameters[0].device}"
    elif block.converted:
        change = f"converted {block.converted}"
    if change is not None:
        raise ModelChanged(
            f"layer {block.name!r} was {change} after the Preconditioner was made; close that, and make a new "
            "Preconditioner (or kfdist.Optimizer) of the model as it is now"
        )


def device_of(model: nn.Module, blocks: Iterable[Block]) -> torch.device:
    """Returns where all blocks are; without any, where the model begins.

    Raises:
        ConfigError: The blocks are on several devices.
    """
    devices = {parameter.device: block.name for block in blocks for parameter in block.parameters()}
    if len(devices) > 1:
        listed = ", ".join(f"{name!r} on {device}" for device, name in devices.items())
        raise ConfigError(f"the model's layers are on several devices ({listed}); one device per process is needed")
    first = next(model.parameters(), torch.empty(0, dtype=torch.float32, device="cpu"))
    return next(iter(devices), first.device)

"""From a model and a choice of methods to groups of blocks, and a report of what is covered and why the rest is not."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from kfdist.assignment import courier_ranks
from kfdist.curvature.blocks import Block, make_block
from kfdist.curvature.inverters import AbstractInverter, make_inverter
from kfdist.curvature.jobs import job_bytes
from kfdist.errors import ConfigError
from kfdist.types import BlockName, GroupName, GroupSpec

Method = str | AbstractInverter | Mapping[str, str | AbstractInverter]
"""An inverter's name, an inverter, or either by glob on dotted module names (the first match wins). A glob that matches
a module stands for everything inside it too; "*" also matches dots."""


@dataclass(frozen=True, kw_only=True)
class CoverageRow:
    """What happens to one parameter.

    Attributes:
        parameter: Its dotted name.
        block: The block that preconditions it, or None.
        method: The block's inverter, or None.
        reason: Why it has no block; empty otherwise.
    """

    parameter: str
    block: str | None
    method: str | None
    reason: str


@dataclass(frozen=True)
class Coverage:
    """Every parameter of a model and what preconditions it; `str()` gives a table."""

    rows: tuple[CoverageRow, ...]

    def __str__(self) -> str:
        width = max((len(row.parameter) for row in self.rows), default=0)
        return "\n".join(
            f"{row.parameter:<{width}}  {row.method or '-':<12}  {row.block or row.reason}" for row in self.rows
        )


@dataclass(frozen=True, kw_only=True)
class BlockGroup:
    """The unit of phase, version and adoption.

    Attributes:
        index: Place in the model's order, from 0; its column in the table.
        name: Unique name; a single block's own.
        blocks: The blocks inverted together.
        inverter: What inverts them.
        courier_rank: The rank that ships their statistics and announces their results.
        spec: The group as the assignment sees it.
    """

    index: int
    name: GroupName
    blocks: tuple[Block, ...]
    inverter: AbstractInverter
    courier_rank: int
    spec: GroupSpec


@dataclass(frozen=True, kw_only=True)
class BlockPlan:
    """All groups of a model.

    Attributes:
        groups: In model order.
        aliases: Further modules that share a block's parameters, by block name; their calls add up.
        coverage: The report for people.
    """

    groups: tuple[BlockGroup, ...]
    aliases: Mapping[BlockName, Sequence[nn.Module]]
    coverage: Coverage


_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module")
"""Where torch.compile's and the activation checkpoint wrapper keep the module that they wrap."""

_MOST_NAMES_SHOWN = 10

_SHARDED = "kfdist needs whole-layer gradients: use DistributedDataParallel, or kfdist's own GradientReducer"


def bare_model(model: nn.Module) -> nn.Module:
    """Strips the wrappers of torch.compile, DistributedDataParallel and activation checkpointing, in any order.

    Raises:
        ConfigError: The model is wrapped by something that splits its layers or copies them to other devices.
    """
    while True:
        if type(model).__name__ == "FullyShardedDataParallel":
            raise ConfigError(f"the model is wrapped by FullyShardedDataParallel, which shards its layers; {_SHARDED}")
        if isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
            raise ConfigError(
                "the model is wrapped by DataParallel over several devices, whose copies of the layers "
                "can't be measured; use DistributedDataParallel with one process a device"
            )
        # Looked up as submodules: a model that passes attributes on to a part of it is no wrapper.
        inner = next((model._modules[key] for key in _WRAPPED if key in model._modules), None)
        if inner is None and isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            inner = model.module
        if inner is None:
            return model
        model = inner


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


def find_layer(model: nn.Module, name: str) -> nn.Module | None:
    """Returns what `named_layers` calls `name` now, or None."""
    module = bare_model(model)
    for part in name.split(".") if name else ():
        child = module._modules.get(part)
        if child is None:
            return None
        module = bare_model(child)
    return module


def plan_blocks(model: nn.Module, method: Method, *, skip: Sequence[str] = (), world_size: int = 1) -> BlockPlan:
    """Chooses a block and an inverter for every layer that can have one.

    Args:
        model: The bare model.
        method: What inverts which layer.
        skip: Globs on module names that get no block, with everything inside them.
        world_size: Ranks among which the groups' courier duty is dealt, balanced by bytes.

    Raises:
        ConfigError: A glob matches no module, a method is unknown, or no layer of the model has a block.
    """
    patterns = _patterns(method)
    layers = [pair for pair in named_layers(model) if any(True for _ in pair[1].parameters(recurse=False))]
    _check_globs([*patterns, *skip] if isinstance(method, Mapping) else list(skip), [name for name, _ in layers])
    reasons: dict[str, str] = {}
    chosen: list[tuple[Block, AbstractInverter]] = []
    owner_of_weight: dict[int, Block] = {}
    aliases: dict[BlockName, list[nn.Module]] = {}
    for name, module in layers:
        block, inverter, reason = _choose(name, module, patterns, skip)
        if block is None or inverter is None:
            reasons[name] = reason
            continue
        first = owner_of_weight.get(id(module.weight))
        if first is not None:
            reasons[name] = _alias(first, block, aliases)
            continue
        owner_of_weight[id(module.weight)] = block
        chosen.append((block, inverter))
    if not chosen:
        listed = "; ".join(f"{name or 'model'}: {reason}" for name, reason in reasons.items()) or "it has no parameters"
        raise ConfigError(
            f"{type(model).__name__} has no layer that can be preconditioned ({listed}). "
            "Linear and Conv2d layers have a block; check `skip`, the method's globs and requires_grad"
        )
    specs = [_spec(position, block, inverter) for position, (block, inverter) in enumerate(chosen)]
    ranks = courier_ranks(specs, world_size)
    groups = tuple(
        BlockGroup(
            index=index, name=spec.name, blocks=(block,), inverter=inverter, courier_rank=ranks[spec.name], spec=spec
        )
        for index, (spec, (block, inverter)) in enumerate(zip(specs, chosen, strict=True))
    )
    return BlockPlan(groups=groups, aliases=aliases, coverage=_coverage(model, groups, reasons))


def _patterns(method: Method) -> dict[str, AbstractInverter]:
    table = method if isinstance(method, Mapping) else {"*": method}
    if not table:
        raise ConfigError("the method table is empty; give a name, an inverter, or {glob: name or inverter}")
    patterns = {}
    for glob, value in table.items():
        if isinstance(value, str):
            value = make_inverter(value)
        if not isinstance(value, AbstractInverter):
            raise ConfigError(f"method {value!r} is of type {type(value).__name__}; a name or an inverter is needed")
        patterns[glob] = value
    return patterns


def _check_globs(globs: Sequence[str], names: Sequence[str]) -> None:
    for glob in globs:
        if glob != "*" and not any(_covers(glob, name) for name in names):
            shown = ", ".join(repr(name) for name in names[:_MOST_NAMES_SHOWN])
            more = ", ..." if len(names) > _MOST_NAMES_SHOWN else ""
            raise ConfigError(f"the pattern {glob!r} matches no layer; the layers with parameters are {shown}{more}")


def _covers(glob: str, name: str) -> bool:
    """Says whether a glob names a layer, or a module that contains it."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:end]), glob) for end in range(1, len(parts) + 1))


def _choose(
    name: str, module: nn.Module, patterns: Mapping[str, AbstractInverter], skip: Sequence[str]
) -> tuple[Block | None, AbstractInverter | None, str]:
    if any(_covers(glob, name) for glob in skip):
        return None, None, "skipped by configuration"
    if any(hasattr(parameter, "device_mesh") for parameter in module.parameters(recurse=False)):
        raise ConfigError(f"layer {name!r} has sharded (DTensor) parameters; {_SHARDED}")
    inverter = next((value for glob, value in patterns.items() if _covers(glob, name)), None)
    if inverter is None:
        return None, None, "no pattern of the method table matches"
    block = make_block(name, module)
    if isinstance(block, str):
        return None, None, block
    return block, inverter, ""


def _alias(first: Block, second: Block, aliases: dict[BlockName, list[nn.Module]]) -> str:
    """Lets a tied layer's calls add to the first one's block where both are the same function of their input."""
    alike = type(first) is type(second) and first.shape == second.shape
    same_parameters = {id(p) for p in first.parameters()} == {id(p) for p in second.parameters()}
    if alike and same_parameters:
        aliases.setdefault(first.name, []).append(second.module)
        return f"tied to {first.name}, whose block measures both"
    return f"its weight is tied to {first.name}, which has the block"


def _spec(position: int, block: Block, inverter: AbstractInverter) -> GroupSpec:
    return GroupSpec(
        name=block.name, cost=inverter.cost(block.shape), position=position, bytes=job_bytes([block.shape])
    )


def _coverage(model: nn.Module, groups: Sequence[BlockGroup], reasons: Mapping[str, str]) -> Coverage:
    by_parameter = {
        id(parameter): (block.name, group.inverter.name)
        for group in groups
        for block in group.blocks
        for parameter in block.parameters()
    }
    rows, seen = [], set()
    for layer, module in named_layers(model):
        for own_name, parameter in module.named_parameters(layer, recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            block, method = by_parameter.get(id(parameter), (None, None))
            reason = "" if block is not None else reasons.get(layer, "its layer's block leaves it out")
            rows.append(CoverageRow(parameter=own_name, block=block, method=method, reason=reason))
    return Coverage(tuple(rows))

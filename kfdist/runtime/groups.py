"""From a model and a choice of methods to groups of blocks, and a report of what is covered and why the rest is not."""

from collections.abc import Mapping, Sequence
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
"""An inverter's name, an inverter, or either by glob on dotted module names (the first match wins)."""


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


def bare_model(model: nn.Module) -> nn.Module:
    """Strips `torch.compile`'s and DistributedDataParallel's wrappers, in any order."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod  # pyright: ignore[reportAssignmentType]
        elif isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        else:
            return model


def clean_name(name: str) -> str:
    """Drops the wrappers' parts from a dotted module name."""
    return ".".join(part for part in name.split(".") if part not in ("module", "_orig_mod"))


def plan_blocks(model: nn.Module, method: Method, *, skip: Sequence[str] = (), world_size: int = 1) -> BlockPlan:
    """Chooses a block and an inverter for every layer that can have one.

    Args:
        model: The bare model.
        method: What inverts which layer.
        skip: Globs on module names that get no block.
        world_size: Ranks among which the groups' courier duty is dealt, balanced by bytes.

    Raises:
        ConfigError: A glob matches no module, a method is unknown, or no layer of the model has a block.
    """
    patterns = _patterns(method)
    modules = [(clean_name(name), module) for name, module in model.named_modules(remove_duplicate=True)]
    _check_globs([*patterns, *skip] if isinstance(method, Mapping) else list(skip), [name for name, _ in modules])
    reasons: dict[str, str] = {}
    chosen: list[tuple[Block, AbstractInverter]] = []
    owner_of_weight: dict[int, Block] = {}
    aliases: dict[BlockName, list[nn.Module]] = {}
    for name, module in modules:
        if not any(True for _ in module.parameters(recurse=False)):
            continue
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
        if glob != "*" and not any(fnmatchcase(name, glob) for name in names):
            shown = ", ".join(repr(name) for name in names[1:11])
            raise ConfigError(f"the pattern {glob!r} matches no module; the modules are {shown} ...")


def _choose(
    name: str, module: nn.Module, patterns: Mapping[str, AbstractInverter], skip: Sequence[str]
) -> tuple[Block | None, AbstractInverter | None, str]:
    if any(fnmatchcase(name, glob) for glob in skip):
        return None, None, "skipped by configuration"
    if any(hasattr(parameter, "device_mesh") for parameter in module.parameters(recurse=False)):
        raise ConfigError(
            f"layer {name!r} has sharded (DTensor) parameters; kfdist needs whole-layer gradients: use DDP or "
            f"replication"
        )
    inverter = next((value for glob, value in patterns.items() if fnmatchcase(name, glob)), None)
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
    rows = []
    for name, parameter in model.named_parameters():
        name = clean_name(name)
        block, method = by_parameter.get(id(parameter), (None, None))
        reason = "" if block else reasons.get(name.rpartition(".")[0], "its layer's block leaves it out")
        rows.append(CoverageRow(parameter=name, block=block, method=method, reason=reason))
    return Coverage(tuple(rows))

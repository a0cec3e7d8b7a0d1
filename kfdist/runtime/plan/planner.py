"""From a model and a choice of methods to groups of blocks, and a report of what is covered and why the rest is not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from kfdist.comm.communicator import Communicator
from kfdist.comm.together import on_rank_zero
from kfdist.curvature.auto import Auto, MeasuredCosts, make_choice, measure_costs
from kfdist.curvature.blocks import BLOCKS, Block, make_block
from kfdist.curvature.inverter import Coupling
from kfdist.curvature.inverters import AbstractInverter
from kfdist.curvature.jobs import job_bytes
from kfdist.errors import ConfigError
from kfdist.policies.assignment import courier_ranks
from kfdist.runtime.plan.coverage import Coverage, coverage_of
from kfdist.runtime.plan.groups import BlockGroup
from kfdist.runtime.plan.layers import SHARDED, named_layers
from kfdist.types import BlockName, GroupSpec, WeightSharing

Choice = str | AbstractInverter | Auto
"""An inverter's name or "auto", an inverter, or a chooser of them."""

Method = Choice | Mapping[str, Choice]
"""A choice, or choices by glob on dotted module names (the first match wins). A glob that matches a module stands for
everything inside it too; "*" also matches dots."""

_MOST_NAMES_SHOWN = 10


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


@dataclass(frozen=True)
class _Chosen:
    """A block with its method.

    Attributes:
        block: The block.
        inverter: What inverts it.
        pattern: The glob that chose it; blocks of one pattern whose method couples them form a group.
        reason: Why "auto" chose the method; empty where the user did.
    """

    block: Block
    inverter: AbstractInverter
    pattern: str
    reason: str


def plan_blocks(
    model: nn.Module,
    method: Method,
    *,
    skip: Sequence[str] = (),
    world_size: int = 1,
    weight_sharing: WeightSharing = "expand",
    costs: MeasuredCosts | None = None,
) -> BlockPlan:
    """Chooses a block and an inverter for every layer that can have one.

    Args:
        model: The bare model.
        method: What inverts which layer.
        skip: Globs on module names that get no block, with everything inside them.
        world_size: Ranks among which the groups' courier duty is dealt, balanced by bytes.
        weight_sharing: How linear layers treat positions, "expand" or "reduce".
        costs: What inversions cost here, the same on all ranks; for "auto".

    Raises:
        ConfigError: A glob matches no module, a method is unknown or refuses its layers, or no layer of the model has a
            block.
    """
    patterns = _patterns(method)
    layers = [pair for pair in named_layers(model) if any(True for _ in pair[1].parameters(recurse=False))]
    _check_globs([*patterns, *skip] if isinstance(method, Mapping) else list(skip), [name for name, _ in layers])
    reasons: dict[str, str] = {}
    chosen: list[_Chosen] = []
    owner_of_weight: dict[int, Block] = {}
    aliases: dict[BlockName, list[nn.Module]] = {}
    for name, module in layers:
        found = _choose(name, module, patterns, skip, weight_sharing, costs)
        if isinstance(found, str):
            reasons[name] = found
            continue
        first = owner_of_weight.get(id(module.weight))
        if first is not None:
            reasons[name] = _alias(first, found.block, aliases)
            continue
        owner_of_weight[id(module.weight)] = found.block
        chosen.append(found)
    if not chosen:
        listed = "; ".join(f"{name or 'model'}: {reason}" for name, reason in reasons.items()) or "it has no parameters"
        raise ConfigError(
            f"{type(model).__name__} has no layer that can be preconditioned ({listed}). "
            f"{', '.join(kind.__name__ for kind in BLOCKS)} have a block; check `skip`, the method's globs and "
            "requires_grad"
        )
    groups = _make_groups(model, chosen, world_size)
    notes = {
        each.block.name: "; ".join(filter(None, (each.inverter.note(each.block.shape), each.reason))) for each in chosen
    }
    return BlockPlan(groups=groups, aliases=aliases, coverage=coverage_of(model, groups, {**reasons, **notes}))


def _make_groups(model: nn.Module, chosen: Sequence[_Chosen], world_size: int) -> tuple[BlockGroup, ...]:
    members: list[list[_Chosen]] = []
    of_pattern: dict[str, list[_Chosen]] = {}
    for each in chosen:
        if each.inverter.coupling is Coupling.NONE:
            members.append([each])
        elif each.pattern in of_pattern:
            of_pattern[each.pattern].append(each)
        else:
            members.append(of_pattern.setdefault(each.pattern, [each]))
    specs = [_spec(position, group) for position, group in enumerate(members)]
    ranks = courier_ranks(specs, world_size)
    for group in members:
        _check_accepted(model, group)
    return tuple(
        BlockGroup(
            index=index,
            name=spec.name,
            blocks=tuple(each.block for each in group),
            inverter=group[0].inverter,
            needs={each.block.name: each.inverter.needs(each.block.shape) for each in group},
            courier_rank=ranks[spec.name],
            spec=spec,
        )
        for index, (spec, group) in enumerate(zip(specs, members, strict=True))
    )


def _check_accepted(model: nn.Module, group: Sequence[_Chosen]) -> None:
    inverter, blocks = group[0].inverter, {each.block.name: each.block.shape for each in group}
    reason = inverter.refusal(blocks) or inverter.model_refusal(model, list(blocks))
    if reason:
        raise ConfigError(f"{inverter.name} can't invert {', '.join(map(repr, blocks))}: {reason}", path="method")


def _patterns(method: Method) -> dict[str, AbstractInverter | Auto]:
    table = method if isinstance(method, Mapping) else {"*": method}
    if not table:
        raise ConfigError("the method table is empty; give a name, an inverter, or {glob: name or inverter}")
    patterns = {}
    for glob, value in table.items():
        if isinstance(value, str):
            value = make_choice(value)
        if not isinstance(value, AbstractInverter | Auto):
            raise ConfigError(f"method {value!r} is of type {type(value).__name__}; a name or an inverter is needed")
        patterns[glob] = value
    return patterns


def needs_costs(method: Method) -> bool:
    """Says whether a method table chooses by measured cost."""
    return any(isinstance(each, Auto) for each in _patterns(method).values())


def agreed_costs(training: Communicator) -> MeasuredCosts:
    """Returns what inversions cost on rank 0's machine, on all ranks: they have to choose alike."""
    return MeasuredCosts.from_json(on_rank_zero(training, lambda: measure_costs().to_json()))


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
    name: str,
    module: nn.Module,
    patterns: Mapping[str, AbstractInverter | Auto],
    skip: Sequence[str],
    weight_sharing: WeightSharing,
    costs: MeasuredCosts | None,
) -> _Chosen | str:
    """Returns a layer's block and method, or why it has none."""
    if any(_covers(glob, name) for glob in skip):
        return "skipped by configuration"
    if any(hasattr(parameter, "device_mesh") for parameter in module.parameters(recurse=False)):
        raise ConfigError(f"layer {name!r} has sharded (DTensor) parameters; {SHARDED}")
    pattern = next((glob for glob in patterns if _covers(glob, name)), None)
    if pattern is None:
        return "no pattern of the method table matches"
    block = make_block(name, module, sharing=weight_sharing)
    if isinstance(block, str):
        return block
    inverter = patterns[pattern]
    if isinstance(inverter, AbstractInverter):
        return _Chosen(block, inverter, pattern, "")
    if costs is None:
        raise ConfigError('"auto" needs to know what inversions cost; give `costs` (kfdist.curvature.auto)')
    picked, reason = inverter.choose(block.shape, costs)
    return _Chosen(block, picked, pattern, reason)


def _alias(first: Block, second: Block, aliases: dict[BlockName, list[nn.Module]]) -> str:
    """Lets a tied layer's calls add to the first one's block where both are the same function of their input."""
    # The representation tells stride, padding and all else that makes convolutions of one weight differ.
    alike = type(first) is type(second) and first.module.extra_repr() == second.module.extra_repr()
    same_parameters = {id(p) for p in first.parameters()} == {id(p) for p in second.parameters()}
    if alike and same_parameters:
        aliases.setdefault(first.name, []).append(second.module)
        return f"tied to {first.name}, whose block measures both"
    return f"its weight is tied to {first.name}, which has the block"


def _spec(position: int, members: Sequence[_Chosen]) -> GroupSpec:
    names = [each.block.name for each in members]
    return GroupSpec(
        name=names[0] if len(names) == 1 else f"{names[0]}..{names[-1]}",
        cost=sum(each.inverter.cost(each.block.shape) for each in members),
        position=position,
        bytes=job_bytes([(each.block.shape, each.inverter.needs(each.block.shape)) for each in members]),
    )

"""The plan: from a model, a choice of methods and settings to groups of blocks, and why the rest has none."""

from collections.abc import Hashable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import NoReturn

import torch
from torch import nn

from kfdist.curvature.auto import Auto, MeasuredCosts, make_choice
from kfdist.curvature.blocks import (
    SUPPORTED,
    TABLES,
    WITHOUT_UNITS,
    Block,
    EmbeddingBlock,
    UnitBlock,
    head_of,
    held_matrices,
    make_bare_block,
    make_blocks,
    multiplied_weights,
    note_shared,
)
from kfdist.curvature.by_width import BARE, UNMULTIPLIED, ByWidth
from kfdist.curvature.gradient_inverter import AbstractGradientInverter
from kfdist.curvature.inverter import Coupling
from kfdist.curvature.inverters import AbstractInverter
from kfdist.curvature.inverters.kfac_diagonal import KfacDiagonal
from kfdist.curvature.inverters.unit_wise import UnitWise
from kfdist.curvature.jobs import job_bytes
from kfdist.errors import ConfigError
from kfdist.policies.assignment import courier_ranks
from kfdist.runtime.plan.capacity import need_of
from kfdist.runtime.plan.coverage import NO_METHOD, SKIPPED, UNMATCHED, WITHOUT_MOMENTS, Coverage, coverage_of
from kfdist.runtime.plan.groups import BlockGroup, are_small, check_fisher, refuse_applied_rows
from kfdist.runtime.plan.layers import (
    SHARDED,
    bare_model,
    bare_parameters,
    check_model,
    device_of,
    is_compiled,
    named_layers,
)
from kfdist.runtime.plan.whole_parameters import whole_parameters
from kfdist.runtime.settings import Settings
from kfdist.types import GroupSpec

_Entry = AbstractInverter | Auto | ByWidth

Choice = str | _Entry
"""An inverter's name or "auto", an inverter, or a chooser of them."""

NONE = "none"
"""The method that leaves everything to the optimizer, for comparisons."""

Method = Choice | Mapping[str, Choice]
"""A choice, or choices by glob on dotted module names (the first match wins), or "none". A glob that matches a module
stands for everything inside it too; "*" also matches dots."""

LOOKED_UP = (
    "an embedding has the same weight: what it looks up enters the gradient and not the curvature, which is that of "
    "the product alone (docs/decisions/0018)"
)
"""What there is to say of a block whose weight is a table too."""

_MOST_NAMES_SHOWN = 10
_LEAST_BYTES_PER_BLOCK = 2**20


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is done to which layer of a model, and when: what a Preconditioner carries out.

    Attributes:
        model: The bare model.
        settings: What was asked for.
        world_size: Ranks among which the groups' courier duty is dealt.
        groups: In model order; empty for the method "none".
        coverage: What happens to each parameter, and why.
        device: Where the blocks are, and their statistics.
        costs: What inversions cost, if "auto" chose by it.
        compiled: Whether torch.compile made the model, or a part of it: it runs eagerly on steps that measure.
    """

    model: nn.Module
    settings: Settings
    world_size: int
    groups: tuple[BlockGroup, ...]
    coverage: Coverage
    device: torch.device
    costs: MeasuredCosts | None
    compiled: bool

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks of all groups."""
        return tuple(block for group in self.groups for block in group.blocks)

    @property
    def together(self) -> bool:
        """Whether all blocks are folded at the same steps: where a step that measures costs much whatever it measures.

        Else they are spread, so that no step takes much longer than the others.
        """
        return self.compiled or are_small(self.groups)


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


def make_plan(
    model: nn.Module, method: Method, settings: Settings, *, world_size: int, costs: MeasuredCosts | None = None
) -> Plan:
    """Chooses a block and an inverter for every layer that can have one. A pure function, so that ranks plan alike.

    Args:
        model: The model, also wrapped; on the meta device as a whole, for a plan that nobody carries out.
        method: What inverts which layer.
        settings: What is asked for.
        world_size: Ranks among which the groups' courier duty is dealt, balanced by bytes.
        costs: What inversions cost, the same on all ranks; needed where `needs_costs(method)`.

    Raises:
        ConfigError: A glob matches no module, a method is unknown, refuses its layers or doesn't go with the Fisher, or
            no layer of the model has a block.
    """
    check_model(model)
    compiled = is_compiled(model)
    model, skip = bare_model(model), settings.skip
    patterns = _patterns(method)
    layers = [pair for pair in named_layers(model) if any(True for _ in pair[1].parameters(recurse=False))]
    unlike = _weights_with_several_biases(layers)
    heads = {id(weight) for module in model.modules() if _has_tables(module) for weight in multiplied_weights(module)}
    held = held_matrices(model)
    outline = all(parameter.is_meta for parameter in model.parameters())
    made: dict[str, Sequence[Block] | str] = {}
    open_layers = [pair for pair in layers if not _barred(*pair, patterns, settings, outline=outline)]
    whole = whole_parameters(open_layers, patterns, _covers, skipped=lambda name: _skips(settings, name))
    for name, module in layers:
        if whole.has_part_of(module):
            made[name] = []
            continue
        biased = id(getattr(module, "weight", None)) not in unlike
        blocks = _barred(name, module, patterns, settings, outline=outline) or make_blocks(
            name, module, settings.weight_sharing, biased=biased, held=held.get(id(module))
        )
        made[name] = blocks if isinstance(blocks, str) else [_head_if(each, heads, settings) for each in blocks]
    tied = _tied_to_tables(block for blocks in made.values() if not isinstance(blocks, str) for block in blocks)
    reasons: dict[str, str] = dict(whole.reasons)
    chosen: list[_Chosen] = [_Chosen(*each, reason="") for each in whole.blocks]
    owners: dict[Hashable, Block] = {each.block.name: each.block for each in chosen}
    taken: set[int] = set(whole.taken)
    tables: dict[str, str] = {}
    for name, blocks in made.items():
        if isinstance(blocks, str):
            reasons[name] = blocks
            continue
        for block in blocks:
            taken.update(id(parameter) for parameter in block.parameters())
            other = tied.get(id(block.parts[0].parameter))
            block.looked_up |= other is not None
            if other is not None and isinstance(block, EmbeddingBlock):
                tables[block.name] = other
                continue
            first = owners.setdefault(_weight_key(block), block)
            found = _choose(block, patterns, settings, costs) if first is block else _tied(block, first)
            if isinstance(found, str):
                reasons[block.name] = found
            else:
                chosen.append(found)
    reasons |= _of_tied_tables(tables, reasons)
    for block in _bare_blocks(open_layers, taken, reasons):
        owners[block.name] = block
        found = _choose(block, patterns, settings, costs)
        if isinstance(found, str):
            reasons[block.name] = reasons.get(block.layer, found) if found == UNMULTIPLIED else found
        else:
            chosen.append(found)
    order = {name: position for position, (name, _) in enumerate(layers)}
    chosen.sort(key=lambda each: order[each.block.layer])
    names = list(dict.fromkeys([*(name for name, _ in layers), *(block.name for block in owners.values())]))
    others = [name for name, parameter in bare_parameters(model) if id(parameter) not in whole.taken]
    _check_globs(patterns if isinstance(method, Mapping) else (), names, others)
    _check_globs(skip, [*names, *whole.names], others)
    if patterns and not chosen:
        listed = "; ".join(f"{name or 'model'}: {reason}" for name, reason in reasons.items()) or "it has no parameters"
        raise ConfigError(
            f"{type(model).__name__} has no layer that can be preconditioned ({listed}). "
            f"{SUPPORTED} have a block; check `skip`, the method's globs and requires_grad"
        )
    note_shared(each.block for each in chosen)
    groups = _make_groups(model, chosen, world_size)
    _check_rows(groups, settings, world_size)
    smaller = _smaller_budgets(patterns)
    if costs is not None and costs.memory is not None and smaller and need_of(groups, on_host=True) > costs.memory:
        return make_plan(model, smaller, settings, world_size=world_size, costs=costs)
    return Plan(
        model=model,
        settings=settings,
        world_size=world_size,
        groups=groups,
        coverage=coverage_of(model, groups, {**reasons, **_notes(chosen)}),
        device=device_of(model, (each.block for each in chosen)),
        costs=costs if any(isinstance(each, Auto) for each in patterns.values()) else None,
        compiled=compiled,
    )


def _notes(chosen: Iterable[_Chosen]) -> dict[str, str]:
    """Returns what there is to say of each block, by its name."""
    return {
        each.block.name: "; ".join(
            filter(
                None,
                (each.inverter.note(each.block.shape), each.reason, LOOKED_UP if each.block.looked_up else ""),
            )
        )
        for each in chosen
    }


def _smaller_budgets(patterns: Mapping[str, _Entry]) -> dict[str, _Entry]:
    """Halves what "auto" may spend on a block; empty where nothing is chosen, or little can be spent already."""
    chosen = [each for each in patterns.values() if isinstance(each, Auto)]
    if not chosen or min(each.bytes_per_block for each in chosen) < _LEAST_BYTES_PER_BLOCK:
        return {}
    return {
        glob: replace(each, bytes_per_block=each.bytes_per_block // 2) if isinstance(each, Auto) else each
        for glob, each in patterns.items()
    }


def _check_rows(groups: Sequence[BlockGroup], settings: Settings, world_size: int) -> None:
    """Refuses methods that take rows of examples where there are none, or multiply onto rows of a part of the batch."""
    check_fisher(settings.fisher, groups)
    if world_size > 1:
        refuse_applied_rows(groups, f"the gradients of {world_size} ranks are averaged")
    if settings.fisher != "empirical":
        refuse_applied_rows(groups, f"fisher = {settings.fisher!r} measures other gradients than the loss's own")
    if settings.sampling.examples < 1:
        fraction = settings.sampling.examples
        refuse_applied_rows(groups, f"examples_fraction = {fraction} measures a part of it")
    if settings.weight_sharing == "reduce":
        refuse_applied_rows(groups, "weight_sharing = 'reduce' measures the mean of an example's rows")


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


def _patterns(method: Method) -> dict[str, _Entry]:
    if method == NONE:
        return {}
    table = method if isinstance(method, Mapping) else {"*": method}
    if not table:
        raise ConfigError("the method table is empty; give a name, an inverter, or {glob: name or inverter}")
    patterns = {}
    for glob, value in table.items():
        if isinstance(value, str):
            value = make_choice(value)
        if not isinstance(value, _Entry):
            raise ConfigError(f"method {value!r} is of type {type(value).__name__}; a name or an inverter is needed")
        patterns[glob] = value
    return patterns


def needs_costs(method: Method) -> bool:
    """Says whether a method table chooses by measured cost."""
    return any(isinstance(each, Auto) for each in _patterns(method).values())


def _check_globs(globs: Iterable[str], names: Sequence[str], others: Sequence[str]) -> None:
    """Refuses globs that cover none of some names; `others` are those of parameters that no glob may name."""
    for glob in globs:
        if glob == "*" or any(_covers(glob, name) for name in names):
            continue
        shown = ", ".join(repr(name) for name in names[:_MOST_NAMES_SHOWN])
        more = ", ..." if len(names) > _MOST_NAMES_SHOWN else ""
        layers = dict.fromkeys(name.rpartition(".")[0] for name in others if _covers(glob, name))
        instead = ", ".join(map(repr, filter(None, layers)))
        hint = f"; only methods on gradients take single parameters: write {instead}" if instead else ""
        raise ConfigError(f"the pattern {glob!r} matches no layer{hint}; the layers with parameters are {shown}{more}")


def _covers(glob: str, name: str) -> bool:
    """Says whether a glob names a layer, or a module that contains it."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:end]), glob) for end in range(1, len(parts) + 1))


def _skips(settings: Settings, name: str) -> bool:
    """Says whether the user leaves a module, or what is inside it, out."""
    return any(_covers(glob, name) for glob in settings.skip)


def _barred(name: str, module: nn.Module, patterns: Mapping[str, object], settings: Settings, *, outline: bool) -> str:
    """Returns why a layer is to have no blocks; empty if it may."""
    if not patterns:
        return NO_METHOD
    if _skips(settings, name):
        return SKIPPED
    if any(hasattr(parameter, "device_mesh") for parameter in module.parameters(recurse=False)):
        raise ConfigError(f"layer {name!r} has sharded (DTensor) parameters; {SHARDED}")
    own = {} if outline else dict(module.named_parameters(recurse=False))
    if without := next((label for label, parameter in own.items() if parameter.is_meta), ""):
        return f"{type(module).__name__}: its {without} is on the meta device and has no values"
    return ""


def _bare_blocks(
    layers: Iterable[tuple[str, nn.Module]], taken: Set[int], reasons: dict[str, str]
) -> Sequence[UnitBlock]:
    """Makes blocks of the parameters that no other block has, and notes why some can't have one."""
    found: dict[int, UnitBlock] = {}
    for name, module in layers:
        for attribute, parameter in module.named_parameters(recurse=False):
            if isinstance(module, WITHOUT_UNITS) or id(parameter) in taken or id(parameter) in found:
                continue
            full = f"{name}.{attribute}" if name else attribute
            block = make_bare_block(full, name, module, attribute)
            if isinstance(block, str):
                reasons.setdefault(full, reasons.get(name, block))
            else:
                found[id(parameter)] = block
    return list(found.values())


def _choose(
    block: Block,
    patterns: Mapping[str, _Entry],
    settings: Settings,
    costs: MeasuredCosts | None,
) -> _Chosen | str:
    """Returns a block with its method, or why it has none."""
    if _skips(settings, block.name):
        return SKIPPED
    pattern = next((glob for glob in patterns if _covers(glob, block.name)), None)
    if pattern is None:
        return UNMATCHED
    inverter, reason = patterns[pattern], ""
    if isinstance(inverter, ByWidth):
        found = inverter.choose(block)
        if isinstance(found, str):
            return found
        inverter, reason = found
    if isinstance(block, UnitBlock | EmbeddingBlock):
        if isinstance(inverter, AbstractInverter) and inverter.produces.normalised:
            if not isinstance(block, UnitBlock) or not block.bare_matrix:
                return WITHOUT_MOMENTS
            return UNMULTIPLIED if block.named_weight else BARE
        return _Chosen(block, UnitWise() if isinstance(block, UnitBlock) else KfacDiagonal(), pattern, "")
    if isinstance(inverter, Auto):
        if costs is None:
            raise ConfigError('"auto" needs to know what inversions cost; give `costs` (kfdist.curvature.auto)')
        inverter, reason = inverter.choose(block.shape, costs)
    if isinstance(inverter, AbstractGradientInverter):
        _refuse_part(block, inverter, pattern)
    if block.routed and not _takes_experts(inverter, block):
        return (
            f"{inverter.name} takes rows of examples, or products with other layers, which experts don't have; give it "
            "kfac, kfac-eigen, rs-kfac or eva by a pattern"
        )
    return _Chosen(block, inverter, pattern, reason)


def _refuse_part(block: Block, inverter: AbstractInverter, pattern: str) -> NoReturn:
    """Refuses a block that isn't a whole parameter, which is all that methods on gradients take, by `ConfigError`."""
    names = [f"{block.layer}.{part.attribute}".lstrip(".") for part in block.parts]
    raise ConfigError(
        f"{inverter.name} takes whole parameters, and {pattern!r} gives it {block.name!r}, a part of "
        f"{names[0]!r} or of a layer whose parameters another pattern has; give the parameter's name for a pattern, "
        f"as in {{{names[0]!r}: {inverter.name!r}}}",
        path="method",
    )


def _takes_experts(inverter: AbstractInverter, block: Block) -> bool:
    """Says whether a method makes do with sums over the rows of each of the c matrices."""
    needs = inverter.needs(block.shape)
    rows = needs.increments or needs.applied_rows or needs.samples is not None or needs.calibration is not None
    return inverter.coupling is Coupling.NONE and not rows and not inverter.online


def _tied(block: Block, first: Block) -> str:
    """Says what becomes of a layer whose weight an earlier layer's block has."""
    if block.operation == first.operation:
        return f"tied to {first.name}, whose block measures both"
    return f"its weight is tied to {first.name}, which has the block and uses it otherwise"


def _weight_key(block: Block) -> Hashable:
    part = block.parts[0]
    return id(part.parameter), None if part.rows is None else (part.rows.start, part.rows.stop)


def _weights_with_several_biases(layers: Sequence[tuple[str, nn.Module]]) -> set[int]:
    """Returns ids of the weights that layers with different biases share: no row of such a block fits all its uses."""
    biases: dict[int, set[int]] = {}
    for _, module in layers:
        if isinstance(getattr(module, "weight", None), nn.Parameter) and hasattr(module, "bias"):
            biases.setdefault(id(module.weight), set()).add(id(module.bias))
    return {weight for weight, found in biases.items() if len(found) > 1}


def _has_tables(module: nn.Module) -> bool:
    """Whether there are embeddings inside a module."""
    return not isinstance(module, TABLES) and any(isinstance(each, TABLES) for each in module.modules())


def _head_if(block: Block, heads: Set[int], settings: Settings) -> Block:
    """Returns the block of a head in place of a table's, where a function multiplies with the table's weight."""
    if isinstance(block, EmbeddingBlock) and id(block.parts[0].parameter) in heads:
        return head_of(block, settings.weight_sharing)
    return block


def _tied_to_tables(blocks: Iterable[Block]) -> dict[int, str]:
    """Returns the weights, by id, of embeddings and of other blocks at once, and the name of the first of those."""
    found = list(blocks)
    tables = {id(each.parts[0].parameter) for each in found if isinstance(each, EmbeddingBlock)}
    others = {
        id(each.parts[0].parameter): each.name for each in reversed(found) if not isinstance(each, EmbeddingBlock)
    }
    return {weight: name for weight, name in others.items() if weight in tables}


def _of_tied_tables(tables: Mapping[str, str], reasons: Mapping[str, str]) -> dict[str, str]:
    """Returns why tables whose weight a head has, given by its name, have no block: where it has none, its reason."""
    return {
        table: reasons.get(other, f"its weight is tied to {other or 'the model'}, whose block is that of both")
        for table, other in tables.items()
    }


def _spec(position: int, members: Sequence[_Chosen]) -> GroupSpec:
    names = [each.block.name for each in members]
    return GroupSpec(
        name=names[0] if len(names) == 1 else f"{names[0]}..{names[-1]}",
        cost=sum(each.inverter.cost(each.block.shape) for each in members),
        position=position,
        bytes=job_bytes([(each.block.shape, each.inverter.needs(each.block.shape)) for each in members]),
    )

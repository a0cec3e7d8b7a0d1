"""What a rank and an owner hold in memory, line by line."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from kfdist.config import Config
from kfdist.config.task_sections import OWN_OPTIMIZER
from kfdist.curvature.footprint import NUMBER_BYTES
from kfdist.forecast.inversion_costs import Costs
from kfdist.forecast.outline import META
from kfdist.forecast.rehearsal import Rehearsal
from kfdist.optim.graft import KEPT
from kfdist.runtime.plan.capacity import largest_inversion
from kfdist.runtime.plan.groups import BlockGroup
from kfdist.runtime.plan.planner import Plan
from kfdist.runtime.reduce.gradient_moments import empty_gradient_sums
from kfdist.runtime.reduce.reducer import empty_sums
from kfdist.training.optimizers import check_optimizer, make_optimizer
from kfdist.types import GroupName


@dataclass(frozen=True)
class Line:
    """One thing that takes memory.

    Attributes:
        what: What it is.
        bytes: How much; None if that can't be known without a run.
        passing: Whether it comes and goes, rather than being there all the time.
        note: How it is counted, or why it isn't known.
    """

    what: str
    bytes: int | None
    passing: bool = False
    note: str = ""


def rank_lines(config: Config, plan: Plan, rehearsal: Rehearsal, costs: Costs) -> list[Line]:
    """Lists what a rank holds: beside Python, torch and what their libraries take.

    Args:
        config: What is to run.
        plan: Of its model, on the meta device.
        rehearsal: Of that plan.
        costs: Measured on this machine.
    """
    model = plan.model
    known = [each for each in model.parameters() if not isinstance(each, UninitializedParameter)]
    lazy = sum(isinstance(each, UninitializedParameter) for each in model.parameters())
    note = f"without {lazy} lazy parameters, whose sizes a first forward decides" if lazy else ""
    trained = bytes_of(each for each in known if each.requires_grad)
    lines = [
        Line("parameters", bytes_of(known), note=note),
        Line("buffers", bytes_of(model.buffers())),
        Line("gradients", trained),
        optimizer_line(config, plan, known),
    ]
    if config.optimizer.average_decay is not None:
        lines.append(Line("moving average of the weights", bytes_of(known)))
    if plan.groups:
        lines += [*_curvature_lines(plan, rehearsal, costs)]
        note = "in the host's memory, by rank 0, until the checkpoint is written"
        lines.append(Line("inverses as a checkpoint's bytes", _saved_bytes(plan, rehearsal, costs), True, note))
    if plan.world_size > 1:
        lines.append(Line("gradients on their way", trained, passing=True, note="buckets that are being reduced"))
    return [*lines, *_activation_lines(config, rehearsal), *_inversion_lines(config, plan)]


def optimizer_line(config: Config, plan: Plan, parameters: Sequence[nn.Parameter]) -> Line:
    """Has the optimizer make its state on the meta device, where the parameters are; kfdist's own is counted."""
    if config.optimizer.name == OWN_OPTIMIZER:
        check_optimizer(config.optimizer, parameters, plan.groups)
        blocked = {parameter for block in plan.blocks for parameter in block.parameters()}
        normalised = [group for group in plan.groups if group.inverter.produces.normalised]  # with moments of its own
        finished = {parameter for group in normalised for block in group.blocks for parameter in block.parameters()}
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        kept = KEPT[str(config.optimizer.settings.get("graft", "adamw"))]
        of_blocks = bytes_of(parameter for parameter in trained if parameter in blocked - finished)
        of_others = bytes_of(parameter for parameter in trained if parameter not in blocked)
        found = kept.of_blocks * of_blocks + kept.of_others * of_others
        return Line("optimizer state", found, note=config.optimizer.name)
    try:
        optimizer = make_optimizer(config.optimizer, iter(parameters))
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        optimizer.step()
        values = (value for state in optimizer.state.values() for value in state.values())
        found = bytes_of(value for value in values if isinstance(value, Tensor))
    except (RuntimeError, NotImplementedError) as error:
        return Line("optimizer state", None, note=f"{config.optimizer.name} can't be tried without values ({error})")
    finally:
        for parameter in parameters:
            parameter.grad = None
    return Line("optimizer state", found, note=config.optimizer.name)


def _curvature_lines(plan: Plan, rehearsal: Rehearsal, costs: Costs) -> Iterable[Line]:
    sums = empty_sums(plan.groups, META)
    captured = sum(bytes_of((*each.sums.values(), *each.counts.values())) for each in sums.values())
    moments = [moment_bytes(g for g in plan.groups if g.courier_rank == rank) for rank in range(plan.world_size)]
    spread = "gradients' moments of the rank that has most" if any(moments) and plan.world_size > 1 else ""
    yield Line("statistics", captured + max(moments), note=spread)
    own = [group for group in plan.groups if group.own]
    sent = [group for group in plan.groups if not group.own]
    inverses = sum(inverse_bytes(group, costs) for group in sent)
    unknown = [group.name for group in own if group.name not in rehearsal.own]
    note = f"without {len(unknown)} blocks that ranks invert themselves: {rehearsal.fault}" if unknown else ""
    yield Line("inverses in use", inverses + sum(rehearsal.own.values()), note=note)
    prepared = sum(prepared_bytes(group) for group in sent)
    if prepared:
        yield Line("worked out of them for the damping", prepared)
    online = [group for group in sent if group.inverter.online]
    if online:
        received = max(
            sum(result_bytes(group, costs) for group in online if group.courier_rank == rank)
            for rank in range(plan.world_size)
        )
        yield Line("results that the next jobs go on from", received, note="as bytes, by the rank that ships them")
    scales = sum(_scales(group) for group in sent)
    if scales:
        yield Line("scales that ranks measure", scales)
    measured = None if rehearsal.fault else rehearsal.measured
    yield Line("a batch's own statistics", measured, passing=True, note=rehearsal.fault or "where all blocks are due")


def _activation_lines(config: Config, rehearsal: Rehearsal) -> Iterable[Line]:
    note = rehearsal.fault or "counted in float32"
    if not rehearsal.fault and config.run.precision != "float32":
        note = f"counted in float32; {config.run.precision} halves most of it"
    yield Line("activations kept for the backward", rehearsal.activations, passing=True, note=note)


def _inversion_lines(config: Config, plan: Plan) -> Iterable[Line]:
    sent = [group for group in plan.groups if not group.own]
    if config.cluster.link == "local" and sent:
        note = "in the host's memory, the largest block's; more where it is free"
        yield Line("an inversion under way", largest_inversion(sent), passing=True, note=note)


def inverse_bytes(group: BlockGroup, costs: Costs) -> int:
    """Returns what a group's inverses take on a rank, with what their next inversion gets back."""
    method = costs.method(group)
    return round(costs.numbers(group) * (method.inverse + method.state))


def prepared_bytes(group: BlockGroup) -> int:
    """Returns what a rank works out of a group's inverses for its damping, in float32."""
    each = (block.shape.groups * group.inverter.estimate(block.shape).prepared for block in group.blocks)
    return NUMBER_BYTES * sum(each)


def state_bytes(group: BlockGroup, costs: Costs) -> int:
    """Returns what each inversion of a group gets back of the one before."""
    return round(costs.numbers(group) * costs.method(group).state)


def result_bytes(group: BlockGroup, costs: Costs) -> int:
    """Returns the size of a group's result on its way."""
    return round(costs.numbers(group) * costs.method(group).result)


def _saved_bytes(plan: Plan, rehearsal: Rehearsal, costs: Costs) -> int:
    sent = sum(result_bytes(group, costs) for group in plan.groups if not group.own)
    return sent + sum(rehearsal.own.values())


def moment_bytes(groups: Iterable[BlockGroup]) -> int:
    """Returns what the sums of gradients' moments take, which one rank of each group keeps."""
    return sum(bytes_of(sums.tensors()) for sums in empty_gradient_sums(groups, META).values())


def _scales(group: BlockGroup) -> int:
    calibrated = [block.shape for block in group.blocks if group.needs[block.name].calibration is not None]
    return sum(4 * (shape.groups * shape.d_out * shape.d_in + 1) for shape in calibrated)


def scale_bytes(groups: Iterable[BlockGroup]) -> Mapping[GroupName, int]:
    """Returns, by group, what the ranks reduce whenever they measure scales; groups without any are left out."""
    found = {group.name: _scales(group) for group in groups}
    return {name: size for name, size in found.items() if size}


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Returns what tensors take."""
    return sum(tensor.nbytes for tensor in tensors)

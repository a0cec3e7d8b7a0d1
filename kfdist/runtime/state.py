"""A preconditioner's state as nested dictionaries: the format, what a state must fit, and how ranks' states become one.

Each room of the pipeline writes and reads its own part.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from kfdist.errors import CheckpointError, KfdistError
from kfdist.runtime.pipeline import Pipeline

FORMAT = 6
_READABLE_FORMATS = (5, FORMAT)
PER_RANK, FOLDED = "per-rank", "folded"
_EARLIER_DEFAULTS = {
    ("kfac-eigen", "ekfac-adam"): "; a checkpoint of kfdist.Optimizer's earlier default goes on with "
    "method=kfdist.ByWidth()",
    ("rs-kfac", "ekfac-adam"): "; a checkpoint of kfdist.Optimizer's earlier default goes on with "
    "method=kfdist.ByWidth(dense=kfdist.EkfacAdam(basis_period=20)), ema_decay=0.8, or where narrower layers have "
    "kfac-eigen in it with method=kfdist.ByWidth()",
}
"""What a refusal adds, by the method in the checkpoint and the one that takes its place now."""


def pipeline_state(pipeline: Pipeline, *, folded: bool, snapshots: bool = True) -> dict[str, Any]:
    """Describes one rank's pipeline between two steps.

    Args:
        pipeline: The pipeline.
        folded: Whether every rank's sums are the reduced ones; then the totals are stored, good for any world size.
        snapshots: Whether the snapshots, equal on all ranks, are in it.
    """
    world_size = pipeline.training.world_size
    state = {
        "format": FORMAT,
        "step": pipeline.next_step,
        "statistics_step": pipeline.statistics_step,
        "statistics": FOLDED if folded else PER_RANK,
        "world_size": world_size,
        "methods": {track.group.name: track.group.inverter.name for track in pipeline.tracks},
        "biases": list(pipeline.capture.biases.agreed),
        **pipeline.reducer.state_dict(),
        **pipeline.noise_scale.state_dict(),
        **pipeline.inverting.state_dict(),
        **pipeline.adopting.state_dict(snapshots=snapshots),
        **pipeline.in_force.state_dict(),
        **pipeline.agreement.state_dict(),
        **pipeline.timetable.state_dict(pipeline.next_step),
    }
    return {**state, "sums": _scaled(state["sums"], world_size)} if folded else state


def restore_pipeline(pipeline: Pipeline, state: Mapping[str, Any]) -> None:
    """Puts a fresh pipeline where `state` says, and ships again what was under way.

    Nothing has changed when it raises.

    Raises:
        KfdistError: The pipeline has made a step already: its ranks share a table and broadcasts by now.
        CheckpointError: The state is of another format, model, or number of ranks.
        ConfigError: What users had changed while the run trained doesn't go with the configuration any more.
    """
    check_state(pipeline, state)
    state = _as_newest(state)
    if state["statistics"] == FOLDED:
        state = {**state, "sums": _scaled(state["sums"], 1.0 / pipeline.training.world_size)}
    pipeline.in_force.load_state_dict(state)
    pipeline.agreement.load_state_dict(state)
    pipeline.started = True
    pipeline.next_step = int(state["step"])
    pipeline.statistics_step = int(state["statistics_step"])
    pipeline.timetable.load_state_dict(state, pipeline.in_force.settings)
    if pipeline.statistics_step < pipeline.next_step:  # else new periods begin after the step that is done again
        pipeline.timetable.follow(pipeline.in_force.settings, pipeline.next_step)
    for track in pipeline.tracks:
        track.jobs.queued = pipeline.in_force.settings.lag is not None
    pipeline.reducer.load_state_dict(state)
    pipeline.noise_scale.load_state_dict(state)
    pipeline.adopting.load_state_dict(state)
    pipeline.inverting.load_state_dict(state)
    pipeline.capture.biases.settle(state["biases"])
    pipeline.capture.look()
    pipeline.arm()


def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Merges the states of all ranks of a run into one that any number of ranks can load.

    The sums add up, exactly as a reduction would have added them. Versions under way come from whichever rank shipped
    them. A single folded state merges to itself.

    Args:
        states: One per rank, of one step; all but one may lack "snapshots".

    Raises:
        CheckpointError: A rank's state is missing or of another step.
    """
    first = states[0]
    if first["statistics"] == PER_RANK and len(states) != first["world_size"]:
        raise CheckpointError(f"{first['world_size']} ranks wrote states and {len(states)} are here; all are needed")
    if any(state["step"] != first["step"] for state in states):
        raise CheckpointError(
            f"the ranks' states are of steps {sorted({state['step'] for state in states})}, not of one"
        )
    merged = dict(first)
    merged["in_flight"] = {key: value for state in states for key, value in state["in_flight"].items()}
    heads = [head for state in states for head in state["online"].items()]
    merged["online"] = dict(sorted(heads, key=lambda head: int(head[1]["version"])))  # the newest of each group
    merged["moments"] = {key: value for state in states for key, value in state.get("moments", {}).items()}
    merged["memories"] = {key: value for state in reversed(states) for key, value in state["memories"].items()}
    merged["snapshots"] = next((state["snapshots"] for state in states if state.get("snapshots")), {})
    if first["statistics"] == PER_RANK:
        merged["statistics"] = FOLDED
        merged["sums"] = {
            block: {key: sum(state["sums"][block][key] for state in states) for key in sums}
            for block, sums in first["sums"].items()
        }
    return merged


def _scaled(sums: Mapping[str, Mapping[str, Tensor]], scale: float) -> dict[str, dict[str, Tensor]]:
    return {block: {name: tensor * scale for name, tensor in of_block.items()} for block, of_block in sums.items()}


def _as_newest(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns a state in the newest format. In 5, users could change the damping alone; 0: they hadn't."""
    if state["format"] == FORMAT:
        return state
    damping = float(state["damping"])
    return {**state, "changes": {"damping": damping} if damping else {}, "stages": []}


def is_of_now(pipeline: Pipeline, state: Mapping[str, Any]) -> bool:
    """Says whether a state is what this very pipeline has now, not a copy: then there is nothing to load."""
    at = state.get("format"), state.get("step"), state.get("statistics_step")
    same = at == (FORMAT, pipeline.next_step, pipeline.statistics_step)
    return same and state.get("gradient_noise") is pipeline.noise_scale.state_dict()["gradient_noise"]


def check_state(pipeline: Pipeline, state: Mapping[str, Any]) -> None:
    """Checks that `restore_pipeline` can take a state; arguments and errors are its own."""
    if pipeline.started:
        raise KfdistError(
            "load_state_dict() was called after a step or another load; close() this Preconditioner, make a new one, "
            "and load before its first step"
        )
    world_size = pipeline.training.world_size
    if state.get("format") not in _READABLE_FORMATS:
        raise CheckpointError(
            f"the preconditioner's state has format {state.get('format')!r} and this version reads "
            f"{' and '.join(map(str, _READABLE_FORMATS))} alone; "
            "resume it with the version of kfdist that wrote it, or start anew from the model's parameters"
        )
    if state["statistics"] == PER_RANK and state["world_size"] != world_size:
        raise CheckpointError(
            f"the state is one of {state['world_size']} ranks' own and there are {world_size} now; "
            "merge all ranks' states with kfdist.runtime.state.merge_states first"
        )
    found, expected = state["sums"], pipeline.reducer.state_dict()["sums"]
    if found.keys() != expected.keys():
        surplus, lacking = sorted(found.keys() - expected.keys()), sorted(expected.keys() - found.keys())
        raise CheckpointError(
            f"the checkpoint has blocks {surplus} that the model lacks, and lacks {lacking}; load it into the model "
            "and method it was written with, and freeze layers that were trained then only after that"
        )
    methods = {track.group.name: track.group.inverter.name for track in pipeline.tracks}
    if lacking := sorted(methods.keys() - state["methods"].keys()):
        raise CheckpointError(
            f"the checkpoint lacks the groups {lacking}; load it into the model and method it was written with"
        )
    for name, stored in state["methods"].items():
        if methods.get(name) != stored:
            raise CheckpointError(
                f"group {name!r} was inverted by {stored!r} in the checkpoint and has {methods.get(name)!r} now, which "
                "can't go on from it; load it into the model and method it was written with"
                f"{_EARLIER_DEFAULTS.get((stored, methods.get(name) or ''), '')}"
            )
    _check_sums(found, expected)
    moments = pipeline.reducer.moments.state_dict()["moments"]
    stored = state.get("moments", {})
    if lacking := sorted(moments.keys() - stored.keys()):
        raise CheckpointError(
            f"the state lacks the gradients' moments of {lacking}, which another rank kept; call preconditioner.fold() "
            "on all ranks before state_dict(), or load into each rank the state that it saved itself"
        )
    _check_sums(stored, moments)
    pipeline.in_force.check_state(_as_newest(state))


def _check_sums(found: Mapping[str, Mapping[str, Tensor]], expected: Mapping[str, Mapping[str, Tensor]]) -> None:
    for block, sums in expected.items():
        kept = found[block]
        if kept.keys() != sums.keys():
            raise CheckpointError(
                f"block {block!r} has the sums {sorted(kept)} in the checkpoint and its method needs "
                f"{sorted(sums)}; load it into the model and method it was written with"
            )
        for name, tensor in sums.items():
            if kept[name].shape != tensor.shape:
                raise CheckpointError(
                    f"block {block!r} has a factor {name} of shape {tuple(kept[name].shape)} (packed) in the "
                    f"checkpoint and {tuple(tensor.shape)} in the model; the checkpoint is of another model"
                )

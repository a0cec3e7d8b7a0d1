"""A preconditioner's state as nested dictionaries of tensors and JSON values; how several ranks' states become one."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kfdist.curvature.averages import SYMMETRIC, WeightedSums
from kfdist.errors import CheckpointError, KfdistError
from kfdist.linalg.psd import pack_triangle, unpack_triangle
from kfdist.runtime.pipeline import Pipeline
from kfdist.types import JobResult

FORMAT = 2
PER_RANK, FOLDED = "per-rank", "folded"


def pipeline_state(pipeline: Pipeline, *, folded: bool, world_size: int) -> dict[str, Any]:
    """Describes one rank's pipeline between two steps.

    Args:
        pipeline: The pipeline.
        folded: Whether every rank's sums are the reduced ones; then the totals are stored, good for any world size.
        world_size: How many ranks train.
    """
    pipeline.ship_all()
    groups, snapshots = pipeline.parts.groups, pipeline.parts.snapshots
    scale = world_size if folded else 1
    return {
        "format": FORMAT,
        "step": pipeline.next_step,
        "statistics_step": pipeline.statistics_step,
        "statistics": FOLDED if folded else PER_RANK,
        "world_size": world_size,
        "methods": {group.name: group.inverter.name for group in groups},
        "sums": {name: _sums_state(sums, scale) for name, sums in pipeline.sums.items()},
        "snapshots": {
            group.name: {
                "version": snapshots[group.index].version,
                "payload": _to_tensor(snapshots.payload(group.index)),
            }
            for group in groups
            if snapshots[group.index].preconditioners
        },
        "adopted": {group.name: pipeline.parts.ledger.adopted[group.index] for group in groups},
        "starving": [group.name for group in groups if snapshots.starving(group.index)],
        "pending": {group.name: list(pipeline.pending[group.index]) for group in groups},
        "in_flight": _in_flight(pipeline),
        "online": {
            group: {"version": version, "payload": _to_tensor(payload)}
            for group, (version, payload) in pipeline.parts.book.states.items()
        },
        "memories": {
            name: {key: tensor.clone() for key, tensor in memory.items()}
            for name, memory in snapshots.memories.items()
            if memory
        },
        "calibrations": {groups[index].name: count for index, count in snapshots.calibrations.items()},
        "frames": dict(pipeline.parts.reducer.samples.frames),
        "damping": pipeline.parts.agreement.settings.damping,
    }


def restore_pipeline(pipeline: Pipeline, state: Mapping[str, Any], *, world_size: int) -> None:
    """Puts a fresh pipeline where `state` says, and ships again what was under way.

    Nothing has changed when it raises.

    Raises:
        KfdistError: The pipeline has made a step already: its ranks share a table and broadcasts by now.
        CheckpointError: The state is of another format, model, or number of ranks.
    """
    if pipeline.started:
        raise KfdistError(
            "load_state_dict() was called after a step or another load; close() this Preconditioner, make a new one, "
            "and load before its first step"
        )
    _check(pipeline, state, world_size=world_size)
    pipeline.started = True
    scale = 1.0 / world_size if state["statistics"] == FOLDED else 1.0
    for name, sums in pipeline.sums.items():
        _load_sums(sums, state["sums"][name], scale)
    pipeline.next_step = int(state["step"])
    pipeline.statistics_step = int(state["statistics_step"])
    pipeline.parts.agreement.restore(float(state["damping"]))
    for group in pipeline.parts.groups:
        snapshot = state["snapshots"].get(group.name)
        if snapshot is not None:
            pipeline.parts.snapshots.adopt(group.index, int(snapshot["version"]), _to_bytes(snapshot["payload"]))
        pipeline.parts.ledger.restore(group.index, int(state["adopted"][group.name]))
        pipeline.pending[group.index] = [int(version) for version in state["pending"][group.name]]
        if group.name in state["starving"]:
            pipeline.parts.snapshots.mark_starving(group.index)
    _restore_memories(pipeline, state)
    _restore_online(pipeline, state)
    _ship_again(pipeline, state["in_flight"])
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
    merged["memories"] = {key: value for state in reversed(states) for key, value in state["memories"].items()}
    merged["snapshots"] = next((state["snapshots"] for state in states if state.get("snapshots")), {})
    if first["statistics"] == PER_RANK:
        merged["statistics"] = FOLDED
        merged["sums"] = {
            block: {key: sum(state["sums"][block][key] for state in states) for key in sums}
            for block, sums in first["sums"].items()
        }
    return merged


def _sums_state(sums: WeightedSums, scale: int) -> dict[str, Tensor]:
    stored = {name: _stored(name, total) * scale for name, total in sums.sums.items()}
    return {**stored, "weight": sums.weight * scale, "dropped": sums.dropped * scale}


def _stored(name: str, total: Tensor) -> Tensor:
    return pack_triangle(total) if name in SYMMETRIC else total.clone()


def _load_sums(sums: WeightedSums, state: Mapping[str, Tensor], scale: float) -> None:
    for name, total in sums.sums.items():
        total.copy_((unpack_triangle(state[name]) if name in SYMMETRIC else state[name]) * scale)
    sums.weight.copy_(state["weight"] * scale)
    sums.dropped.copy_(state["dropped"] * scale)


def _restore_memories(pipeline: Pipeline, state: Mapping[str, Any]) -> None:
    snapshots = pipeline.parts.snapshots
    device = next(iter(pipeline.sums.values())).weight.device
    for name, memory in state["memories"].items():
        snapshots.memories[name] = {key: tensor.to(device, copy=True) for key, tensor in memory.items()}
    for group in pipeline.parts.groups:
        if group.name in state["calibrations"]:
            snapshots.calibrations[group.index] = int(state["calibrations"][group.name])
        snapshots.ask_whether_measured(group.index)
    snapshots.settle(pipeline.next_step - 1)
    pipeline.parts.reducer.samples.frames.update({name: int(size) for name, size in state["frames"].items()})


def _restore_online(pipeline: Pipeline, state: Mapping[str, Any]) -> None:
    """Tells the job book what its online groups go on from.

    Only those of which this rank is now the courier rank: elsewhere the note would grow old and be saved again. Where
    the state has none (another rank's was lost), they go on from the snapshot in use.
    """
    rank = pipeline.parts.communicators.training.rank
    for group in pipeline.parts.groups:
        if group.courier_rank != rank:
            continue
        for head in (state["snapshots"].get(group.name), state["online"].get(group.name)):
            if head is not None:
                pipeline.parts.book.remember(group.name, int(head["version"]), _to_bytes(head["payload"]))


def _in_flight(pipeline: Pipeline) -> dict[str, dict[str, Any]]:
    """This rank's jobs and results that are not adopted yet, by "group@version"."""
    book = pipeline.parts.book
    jobs = {
        f"{group}@{version}": {"group": group, "version": version, "job": _to_tensor(job.payload)}
        for (group, version), job in book.inputs.items()
    }
    results = {
        f"{group}@{version}": {
            "group": group,
            "version": version,
            "result": _to_tensor(result.payload),
            "seconds": result.seconds,
            "owner": result.owner,
        }
        for (group, version), result in book.results.items()
    }
    return {**jobs, **results}


def _ship_again(pipeline: Pipeline, in_flight: Mapping[str, Mapping[str, Any]]) -> None:
    """Takes over what the checkpoint has of the groups this rank is now the courier rank of, oldest first."""
    rank = pipeline.parts.communicators.training.rank
    mine = {group.name: group for group in pipeline.parts.groups if group.courier_rank == rank}
    for entry in sorted(in_flight.values(), key=lambda entry: (entry["group"], entry["version"])):
        group = mine.get(entry["group"])
        if group is None:
            continue
        version = int(entry["version"])
        if "job" in entry:
            pipeline.resubmit(group.name, version, _to_bytes(entry["job"]))
            continue
        pipeline.parts.book.put(
            JobResult(
                group=group.name,
                version=version,
                payload=_to_bytes(entry["result"]),
                seconds=float(entry["seconds"]),
                owner=str(entry["owner"]),
            )
        )
        pipeline.parts.ledger.announce(group.index, version)


def _check(pipeline: Pipeline, state: Mapping[str, Any], *, world_size: int) -> None:
    if state.get("format") != FORMAT:
        raise CheckpointError(
            f"the preconditioner's state has format {state.get('format')!r}; this version reads {FORMAT}"
        )
    if state["statistics"] == PER_RANK and state["world_size"] != world_size:
        raise CheckpointError(
            f"the state is one of {state['world_size']} ranks' own and there are {world_size} now; "
            "merge all ranks' states with kfdist.runtime.state.merge_states first"
        )
    blocks, own = set(state["sums"]), set(pipeline.sums)
    if blocks != own:
        raise CheckpointError(
            f"the checkpoint has blocks {sorted(blocks - own)} that the model lacks, and lacks {sorted(own - blocks)}; "
            "load it into the model and method it was written with"
        )
    methods = {group.name: group.inverter.name for group in pipeline.parts.groups}
    for name, stored in state.get("methods", methods).items():
        if methods.get(name) != stored:
            raise CheckpointError(
                f"group {name!r} was inverted by {stored!r} in the checkpoint and has {methods.get(name)!r} now, which "
                "can't go on from it; load it into the model and method it was written with"
            )
    for name, sums in pipeline.sums.items():
        stored = {key: value for key, value in state["sums"][name].items() if key not in ("weight", "dropped")}
        if stored.keys() != sums.sums.keys():
            raise CheckpointError(
                f"block {name!r} has the sums {sorted(stored)} in the checkpoint and its method needs "
                f"{sorted(sums.sums)}; load it into the model and method it was written with"
            )
        for key, tensor in sums.sums.items():
            found, expected = tuple(stored[key].shape), tuple(_stored(key, tensor).shape)
            if found != expected:
                raise CheckpointError(
                    f"block {name!r} has a factor {key} of shape {found} (packed) in the checkpoint and {expected} in "
                    "the model; the checkpoint is of another model"
                )


def _to_tensor(payload: bytes) -> Tensor:
    return torch.frombuffer(bytearray(payload), dtype=torch.uint8) if payload else torch.zeros(0, dtype=torch.uint8)


def _to_bytes(tensor: Tensor) -> bytes:
    return tensor.cpu().numpy().tobytes()

"""What a rank trains with, and all of its state that a resumed run needs."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from kfdist.comm.communicator import Communicator
from kfdist.comm.reduce import GradientReducer
from kfdist.config import Config
from kfdist.data.feed import Feed
from kfdist.data.sampler import Position, Sampler
from kfdist.data.task import DataSet
from kfdist.errors import CheckpointError
from kfdist.optim.optimizer import Optimizer
from kfdist.runtime.forward_state import ForwardState, seed_rank
from kfdist.runtime.plan.planner import Plan
from kfdist.runtime.preconditioner import Preconditioner
from kfdist.runtime.state import merge_states
from kfdist.training.averaging import WeightAverage
from kfdist.training.checkpoint import Loaded
from kfdist.training.optimizers import LearningRate, restore_optimizer
from kfdist.training.target import Reached


@dataclass(frozen=True, kw_only=True)
class Materials:
    """What a rank trains with that can be made, and checked, before the run directory is opened.

    Attributes:
        device: Where this rank computes.
        data: The task; what of it is in memory is on that device.
        sampler: Deals the data to the ranks.
        model: The model, on the device.
        plan: What a preconditioner does to the model.
    """

    device: torch.device
    data: DataSet
    sampler: Sampler
    model: nn.Module
    plan: Plan


@dataclass(frozen=True, kw_only=True)
class Training(Materials):
    """Everything a rank trains with; the model is equal on all ranks.

    Attributes:
        config: The run's configuration.
        communicator: The training group.
        feed: This rank's batches.
        learning_rate: By step.
        scaler: Scales the loss with float16, else disabled.
        reducer: Averages the gradients over the ranks.
        preconditioner: Turns them into second-order directions.
        optimizer: Applies these.
        forward_state: What a forward changes besides gradients.
        average: The moving average of the weights, if one is kept.
    """

    config: Config
    communicator: Communicator
    feed: Feed
    learning_rate: LearningRate
    scaler: torch.amp.GradScaler
    reducer: GradientReducer
    preconditioner: Preconditioner
    optimizer: torch.optim.Optimizer
    forward_state: ForwardState
    average: WeightAverage | None


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How far a run has come.

    Attributes:
        step: Steps that are done, the next step to do.
        position: Where in the data the next step is.
        seconds: Seconds trained so far, over all starts.
        checkpoint_serial: The newest request for a checkpoint that was obeyed.
        reached: When the target accuracy was first reached, if it was.
    """

    step: int = 0
    position: Position = Position()
    seconds: float = 0.0
    checkpoint_serial: int = 0
    reached: Reached | None = None


def collect_state(training: Training, standing: Standing) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the state that all ranks share and this rank's own. All ranks must call it.

    The snapshots' bytes are in rank 0's alone, which `CheckpointStore.save` writes: they are as large as the inverses.
    """
    folded = training.config.checkpoint.statistics == "folded"
    if folded:
        training.preconditioner.fold()
    saved = training.optimizer
    # The state_dict of kfdist's own brings the preconditioner's along.
    optimizer = saved.moments_state() if isinstance(saved, Optimizer) else saved.state_dict()
    preconditioner = training.preconditioner.state_dict(snapshots=training.communicator.rank == 0)
    # The snapshots are the same on all ranks, and after folding the sums and moments are too; all are large.
    common = {"snapshots", "sums", "moments"} if folded else {"snapshots"}
    shared = {
        "standing": asdict(standing),
        "examples": len(training.data.train),
        "parameters": dict(training.model.named_parameters()),
        "optimizer": optimizer,
        "scaler": training.scaler.state_dict(),
        "preconditioner": {key: value for key, value in preconditioner.items() if key in common},
    }
    own = {
        "forward": training.forward_state.state_dict(),
        "preconditioner": {key: value for key, value in preconditioner.items() if key not in common},
    }
    if training.average is not None:
        shared["average"], own["average"] = training.average.shared_state(), training.average.own_state()
    return shared, own


def standing_of(loaded: Loaded) -> Standing:
    """Returns how far a checkpoint had come."""
    saved = loaded.shared["standing"]
    reached = saved.get("reached")
    return Standing(
        **{
            **saved,
            "position": Position(**saved["position"]),
            "reached": None if reached is None else Reached(**reached),
        }
    )


def restore_state(training: Training, loaded: Loaded) -> None:
    """Puts all that `collect_state` returned back, also at another number of ranks.

    At the same number of ranks the run goes on bit for bit. At another, sums of statistics are merged, BatchNorm's
    averages take the mean over the old ranks, and generators are seeded anew from (seed, rank, step).

    Raises:
        CheckpointError: It doesn't fit the data, the model, the optimizer or the preconditioner.
    """
    shared, rank = loaded.shared, training.communicator.rank
    same_world = loaded.manifest.world_size == training.communicator.world_size
    # Not in checkpoints of earlier versions.
    if (examples := shared.get("examples")) not in (None, len(training.data.train)):
        raise CheckpointError(
            f"the run has trained on {examples} examples and the data has {len(training.data.train)} now: its position "
            "in them means nothing any more; restore the data, or start a new run"
        )
    _load_parameters(training.model, shared["parameters"])
    restore_optimizer(training.optimizer, training.config.optimizer, shared["optimizer"])
    if shared["scaler"]:  # else the run had none, in another precision
        training.scaler.load_state_dict(shared["scaler"])
    owns = [own for own in loaded.ranks if own is not None]
    if training.average is not None:
        if "average" not in shared:
            raise CheckpointError(
                "the checkpoint has no average of the weights, which optimizer.average_decay asks for; remove it, or "
                "start a new run"
            )
        training.average.load(shared["average"], [own["average"] for own in owns])
    states = [{**own["preconditioner"], **shared["preconditioner"]} for own in owns]
    training.preconditioner.load_state_dict(states[0] if same_world else merge_states(states))
    training.forward_state.load_buffers([own["forward"] for own in owns])
    if same_world:
        training.forward_state.load_random(owns[0]["forward"])
    else:
        seed_rank(training.config.run.seed, worker_rank=rank, start=loaded.manifest.step)
        training.forward_state.remember()


def _load_parameters(model: nn.Module, saved: Mapping[str, torch.Tensor]) -> None:
    own = dict(model.named_parameters())
    if own.keys() != saved.keys():
        raise CheckpointError(
            f"the checkpoint has parameters {sorted(saved.keys() - own.keys())} that the model lacks, and lacks "
            f"{sorted(own.keys() - saved.keys())}; it is of another model"
        )
    with torch.no_grad():
        for name, parameter in own.items():
            if parameter.shape != saved[name].shape:
                raise CheckpointError(
                    f"parameter {name} has shape {tuple(saved[name].shape)} in the checkpoint and "
                    f"{tuple(parameter.shape)} in the model; it is of another model"
                )
            parameter.copy_(saved[name])

"""From a configuration to everything a rank trains with; whatever can be wrong is found before anything is made."""

import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kfdist.capture.requests import Sampling
from kfdist.comm.communicator import Communicator
from kfdist.comm.reduce import GradientReducer
from kfdist.config import Config, PreconditionerSection
from kfdist.config.toml import format_key
from kfdist.curvature.auto import Auto, MeasuredCosts, make_choice, measure_costs
from kfdist.curvature.inverter import AbstractInverter
from kfdist.data import load_data
from kfdist.data.sampler import Sampler
from kfdist.data.sets import DataSet, Examples
from kfdist.errors import ConfigError, EnvironmentFault
from kfdist.models import build_model
from kfdist.runtime.forward_state import ForwardState, seed_rank
from kfdist.runtime.invert.service import Service, connect
from kfdist.runtime.plain import NoPreconditioner
from kfdist.runtime.plan.groups import check_fisher
from kfdist.runtime.plan.planner import Method, needs_costs, plan_blocks
from kfdist.runtime.preconditioner import Preconditioner
from kfdist.system.addresses import server_address
from kfdist.training.optimizers import LearningRate, make_optimizer
from kfdist.training.run_state import Standing, Training

_CONNECT_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class Materials:
    """What can be made, and checked, before the run directory is opened.

    Attributes:
        device: Where this rank computes.
        data: The data set.
        sampler: Deals it to the ranks.
        model: The model, on the device.
        optimizer: Its optimizer.
    """

    device: torch.device
    data: DataSet
    sampler: Sampler
    model: nn.Module
    optimizer: torch.optim.Optimizer


def choose_device(config: Config) -> torch.device:
    """Returns the device of this rank: one GPU per rank of a machine, or the CPU.

    Raises:
        EnvironmentFault: CUDA is asked for and isn't there.
    """
    wanted = config.run.device
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        raise EnvironmentFault(
            f'run.device is "{wanted}" and this is rank {local_rank} of its machine, which has '
            f'{torch.cuda.device_count()} CUDA devices; start fewer ranks, or set run.device = "cpu"'
        )
    return torch.device("cuda", local_rank)


def check_controller(config: Config) -> None:
    """Checks that somebody listens at the controller's address, before anything is started.

    A plain connection: ranks don't speak gRPC, their couriers do.

    Raises:
        ConfigError: The address has port 0, which only a server can take.
        EnvironmentFault: Nobody is there.
    """
    if config.cluster.link != "service":
        return
    address = config.control.address
    reached = server_address(address, field="control.address")
    try:
        socket.create_connection(reached, timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        raise EnvironmentFault(
            f"no controller at {address} ({error}); start `kfdist serve` first, or give its address with "
            "--controller HOST:PORT"
        ) from None


def gather_materials(config: Config, world_size: int, device: torch.device) -> Materials:
    """Makes and checks all that doesn't need the run directory. The same on all ranks, none communicates.

    Args:
        config: The configuration.
        world_size: How many ranks share a step.
        device: Where this rank computes.

    Raises:
        ConfigError: A value is wrong.
    """
    data = _on_device(load_data(config.data.name, config.data.settings), device)
    sampler = Sampler(
        examples=len(data.train),
        batch_size=config.data.batch_size,
        world_size=world_size,
        seed=config.run.seed,
    )
    model = build_model(
        config.model.name,
        config.model.settings,
        example_shape=data.example_shape,
        classes=data.classes,
        seed=config.run.seed,
    ).to(device)
    if (method := make_method(config.preconditioner)) is not None:
        _check_plan(config.preconditioner, method, model, world_size)
    optimizer = make_optimizer(config.optimizer, model.parameters())
    return Materials(device=device, data=data, sampler=sampler, model=model, optimizer=optimizer)


def make_method(section: PreconditionerSection) -> Method | None:
    """Makes what `kfdist.Preconditioner` takes as its method; None for the method "none".

    Raises:
        ConfigError: There is no such method or setting, or a value isn't allowed.
    """
    if section.methods is not None:
        return {pattern: _entry_of(pattern, entry) for pattern, entry in section.methods.items()}
    if section.method is None or section.method == "none":
        return None
    try:
        return make_choice(section.method, **section.settings)
    except ConfigError as error:
        of_settings = error.path not in ("method", "settings", "")
        raise error.under("preconditioner.settings" if of_settings else "preconditioner") from None


def _entry_of(pattern: str, entry: Mapping[str, Any]) -> AbstractInverter | Auto:
    """Makes the method of one pattern; the entry holds its name beside its settings."""
    try:
        return make_choice(entry["method"], **{name: value for name, value in entry.items() if name != "method"})
    except ConfigError as error:
        entry_path = f"preconditioner.methods.{format_key(pattern)}"
        raise (error.at(entry_path) if error.path == "settings" else error.under(entry_path)) from None


def _check_plan(section: PreconditionerSection, method: Method, model: nn.Module, world_size: int) -> None:
    """Checks that the method can invert the model's blocks, from this Fisher and in these periods.

    Raises:
        ConfigError: It can't.
    """
    try:
        plan = plan_blocks(
            model,
            method,
            skip=section.skip,
            world_size=world_size,
            weight_sharing=section.weight_sharing,
            # This plan is only checked; the one that is used is made with costs that all ranks agree on.
            costs=measure_costs() if needs_costs(method) else None,
        )
        check_fisher(section.fisher, plan.groups)
    except ConfigError as error:
        renamed = {"method": "methods" if section.methods is not None else "method", "allow": "settings.allow"}
        raise error.at(renamed.get(error.path, error.path)).under("preconditioner") from None
    for group in plan.groups:
        try:
            group.inverter.update_period(section.factor_period, section.inverse_period)
        except ConfigError as error:
            patterns = method.items() if isinstance(method, Mapping) else ()
            entries = [f"methods.{format_key(pattern)}" for pattern, each in patterns if each is group.inverter]
            raise error.under(f"preconditioner.{(entries or ['settings'])[0]}") from None


def make_training(
    config: Config,
    communicator: Communicator,
    materials: Materials,
    *,
    epoch: int,
    standing: Standing,
    costs: MeasuredCosts | None = None,
) -> Training:
    """Completes what a rank trains with. All ranks must call it.

    Args:
        config: The configuration.
        communicator: The training group.
        materials: What was checked before.
        epoch: This start's number.
        standing: How far the run has come; decides the learning rates of runs that are measured in epochs.
        costs: What inversions cost where the run began, for "auto"; None measures now.
    """
    model, device = materials.model, materials.device
    total_steps = config.run.steps
    if total_steps is None:
        position = materials.sampler.start(standing.position)
        total_steps = standing.step + materials.sampler.steps_until(config.run.epochs or 0, position)
    learning_rate = LearningRate(section=config.optimizer, total_steps=total_steps)
    scaler = torch.amp.GradScaler(device.type, enabled=config.run.precision == "float16")
    seed_rank(config.run.seed, worker_rank=communicator.rank)
    communicator.broadcast_tensors_([tensor.detach() for tensor in (*model.parameters(), *model.buffers())])
    # After the broadcast: buffers are remembered as they are now.
    forward_state = ForwardState(model, device)
    reducer = GradientReducer(list(model.parameters()), communicator)
    if config.preconditioner.method == "none":
        preconditioner = NoPreconditioner(communicator)
    else:
        preconditioner = _make_preconditioner(config, communicator, model, learning_rate, scaler, epoch, costs)
    return Training(
        config=config,
        communicator=communicator,
        device=device,
        data=materials.data,
        sampler=materials.sampler,
        model=model,
        optimizer=materials.optimizer,
        learning_rate=learning_rate,
        scaler=scaler,
        reducer=reducer,
        preconditioner=preconditioner,
        forward_state=forward_state,
    )


def _make_preconditioner(
    config: Config,
    communicator: Communicator,
    model: nn.Module,
    learning_rate: Callable[[int], float],
    scaler: torch.amp.GradScaler,
    epoch: int,
    costs: MeasuredCosts | None,
) -> Preconditioner:
    section = config.preconditioner
    method = make_method(section)
    assert method is not None
    return Preconditioner(
        model,
        method,
        damping=section.damping,
        ema_decay=section.ema_decay,
        factor_period=section.factor_period,
        inverse_period=section.inverse_period,
        fisher=section.fisher,
        weight_sharing=section.weight_sharing,
        sampling=Sampling(
            examples_fraction=section.examples_fraction,
            positions_fraction=section.positions_fraction,
            positions_budget=section.positions_budget,
        ),
        skip=section.skip,
        kl_clip=section.kl_clip or None,
        lr=learning_rate,
        adoption=section.mode,
        grad_scaler=scaler if scaler.is_enabled() else None,
        process_group=communicator.process_group,
        link=_service(config, epoch),
        seed=config.run.seed,
        digest_period=section.digest_period,
        costs=costs,
    )


def _service(config: Config, epoch: int) -> Service | None:
    if config.cluster.link == "local":
        return None
    return connect(
        config.control.address,
        run=config.run.name,
        epoch=epoch,
        assignment=config.cluster.assignment,
        deadline_seconds=config.cluster.job_deadline_seconds,
    )


def _on_device(data: DataSet, device: torch.device) -> DataSet:
    def moved(examples: Examples) -> Examples:
        return Examples(inputs=examples.inputs.to(device), labels=examples.labels.to(device))

    return DataSet(train=moved(data.train), test=moved(data.test), classes=data.classes)

"""From a configuration to everything a rank trains with; whatever can be wrong is found before anything is made."""

import os
import socket
import subprocess
from dataclasses import replace

import torch

from kfdist.comm.communicator import Communicator
from kfdist.comm.reduce import GradientReducer
from kfdist.config import Config
from kfdist.curvature.auto import MeasuredCosts
from kfdist.data.feed import Serving, make_feed
from kfdist.data.sampler import Sampler
from kfdist.data.sets import load_data
from kfdist.data.task import DataSet
from kfdist.errors import ConfigError, EnvironmentFault
from kfdist.models import build_model
from kfdist.rpc.handshake import explain, token_refused
from kfdist.runtime.forward_state import ForwardState, seed_rank
from kfdist.runtime.invert.service import connect
from kfdist.runtime.preconditioner import Preconditioner
from kfdist.system.addresses import server_address
from kfdist.system.credentials import Credentials, Role
from kfdist.system.spawn import module_command, with_package
from kfdist.training.averaging import WeightAverage
from kfdist.training.method import damping_of, inverse_periods, kl_clip_of, plan_of
from kfdist.training.optimizers import LearningRate, check_optimizer, optimizer_of
from kfdist.training.run_state import Materials, Standing, Training
from kfdist.training.trackers.tracker import check_installed
from kfdist.training.trial import try_own_data, try_own_task

_CONNECT_SECONDS = 5.0
_TRIAL_SECONDS = 30.0
_REFUSED = 3  # of kfdist.rpc.trial_call, which loads gRPC


def choose_device(config: Config) -> torch.device:
    """Returns the device of this rank: one GPU per rank of a machine, or the CPU.

    Raises:
        EnvironmentFault: CUDA is asked for and isn't there.
    """
    if _kind_of_device(config) == "cpu":
        return torch.device("cpu")
    local_rank, there = int(os.environ.get("LOCAL_RANK", "0")), _gpu_count()
    if local_rank >= there:
        raise EnvironmentFault(
            f'run.device is "{config.run.device}" and this is rank {local_rank} of its machine, which has '
            f'{there} CUDA devices; start fewer ranks, or set run.device = "cpu"'
        )
    return torch.device("cuda", local_rank)


def _kind_of_device(config: Config) -> str:
    wanted = config.run.device
    return "cuda" if wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available()) else "cpu"


def _gpu_count() -> int:
    # device_count() may ask the driver's management library, which also counts GPUs that torch can't use.
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def check_devices(config: Config) -> None:
    """Checks that each rank that this machine is to start has a device, before any is started.

    Raises:
        EnvironmentFault: There are too few GPUs.
    """
    there, workers = _gpu_count(), config.cluster.workers
    if config.run.device == "cuda" and not there:
        raise EnvironmentFault(
            f'run.device is "cuda", and torch {torch.__version__} sees no GPU here; set run.device = "auto" or "cpu", '
            "or install torch with CUDA"
        )
    if config.run.device != "cpu" and there and workers > there:
        raise EnvironmentFault(
            f"cluster.workers is {workers}, each takes a GPU, and this machine has {there}; set cluster.workers = "
            f'{there} (and data.batch_size for as large a step), or run.device = "cpu"'
        )


def device_name(device: torch.device) -> str:
    """Returns what people call a device: a GPU's model, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def check_controller(config: Config) -> None:
    """Checks that a server listens at the controller's address and takes our certificate and token.

    Before anything is started. Ranks don't speak gRPC: another process makes the one call.

    Raises:
        ConfigError: The address has port 0, which only a server can take.
        EnvironmentFault: Nobody is there, or whoever is there and this rank don't trust each other.
    """
    if config.cluster.link != "service":
        return
    address = config.control.address
    reached = server_address(address, field="control.address")
    try:
        socket.create_connection(reached, timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        raise EnvironmentFault(
            f"no controller at {address} ({error}); start `kfdist serve` first, or give its address in control.address"
        ) from None
    credentials = config.security.credentials(Role.CLIENT)
    if credentials is not None:
        credentials.token()
    if reason := explain(address, credentials, server=Role.CONTROLLER):
        raise EnvironmentFault(reason)
    if credentials is not None and _refuses_token(address, credentials):
        raise EnvironmentFault(token_refused(address, Role.CONTROLLER))


def _refuses_token(address: str, credentials: Credentials) -> bool:
    command = module_command("kfdist.rpc.trial_call", address, credentials.certificates, credentials.token_file)
    try:
        said = subprocess.run(
            command,
            env=with_package(os.environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_TRIAL_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False  # whatever it is, the courier meets it, too
    return said.returncode == _REFUSED


def gather_materials(
    config: Config, world_size: int, device: torch.device, costs: MeasuredCosts | None = None
) -> Materials:
    """Makes and checks all that doesn't need the run directory. The same on all ranks, none communicates.

    Args:
        config: The configuration.
        world_size: How many ranks share a step.
        device: Where this rank computes.
        costs: What inversions cost, the same on all ranks; needed for "auto".

    Raises:
        ConfigError: A value is wrong.
    """
    check_installed(config.run.trackers)
    data = load_data(config.data.name, config.data.settings).on(device)
    # A launcher looks on the CPU at what the ranks do on GPUs: forwarding it there could refuse what trains.
    tried = device.type == _kind_of_device(config)
    try_own_data(config, data, device if tried else None)
    _check_fisher(config, data)
    _check_target(config, data)
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
    if config.run.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    plan = plan_of(config, model, world_size=world_size, costs=costs)
    if tried:
        try_own_task(config, data, model, device)
    check_optimizer(config.optimizer, model.parameters(), plan.groups)
    return Materials(device=device, data=data, sampler=sampler, model=model, plan=plan)


def make_training(
    config: Config,
    communicator: Communicator,
    materials: Materials,
    *,
    epoch: int,
    standing: Standing,
) -> Training:
    """Completes what a rank trains with. All ranks must call it.

    Args:
        config: The configuration.
        communicator: The training group.
        materials: What was checked before.
        epoch: This start's number.
        standing: How far the run has come; decides the learning rates of runs that are measured in epochs, and is
            what the controller hears first.
    """
    model, device = materials.model, materials.device
    sampler, average_decay = materials.sampler, config.optimizer.average_decay
    total_steps, position = config.run.steps, sampler.start(standing.position)
    if total_steps is None:
        total_steps = standing.step + sampler.steps_until(config.run.epochs or 0, position)
    epochs = {"steps_per_epoch": sampler.steps_per_epoch, "epoch_zero": sampler.epoch_zero(standing.step, position)}
    learning_rate = LearningRate(
        section=config.optimizer, total_steps=total_steps, step_examples=sampler.step_examples, **epochs
    )
    scaler = torch.amp.GradScaler(device.type, enabled=config.run.precision == "float16")
    seed_rank(config.run.seed, worker_rank=communicator.rank)
    communicator.broadcast_tensors_([*model.parameters(), *model.buffers()])
    # After the broadcast: buffers are remembered as they are now.
    forward_state = ForwardState(model, device)
    reducer = GradientReducer(list(model.parameters()), communicator)
    if config.data.micro_batches > 1:
        reducer.no_overlap()
    serving = _serving(config, sampler, communicator.rank, device)
    service = None
    if config.cluster.link == "service":
        service = connect(
            config.control.address,
            run=config.run.name,
            epoch=epoch,
            assignment=config.cluster.assignment,
            deadline_seconds=config.cluster.job_deadline_seconds,
            certificates=config.security.certificates,
            token_file=config.security.token_file,
            device="cuda" if config.cluster.bundle.gpus else "cpu",
            first_step=standing.step,
        )
    plan = materials.plan
    settings = replace(
        plan.settings,
        lr=learning_rate,
        damping=damping_of(config.preconditioner, **epochs),
        kl_clip=kl_clip_of(config.preconditioner, **epochs),
        inverse_period=inverse_periods(config.preconditioner, **epochs),
    )
    preconditioner = Preconditioner.from_plan(
        replace(plan, settings=settings),
        grad_scaler=scaler if scaler.is_enabled() else None,
        process_group=communicator.process_group,
        link=service,
    )
    return Training(
        **vars(materials),
        config=config,
        communicator=communicator,
        feed=make_feed(materials.data, serving, position),
        learning_rate=learning_rate,
        scaler=scaler,
        reducer=reducer,
        preconditioner=preconditioner,
        optimizer=optimizer_of(config.optimizer, preconditioner),
        forward_state=forward_state,
        average=None if average_decay is None else WeightAverage(model, average_decay),
    )


def _serving(config: Config, sampler: Sampler, worker_rank: int, device: torch.device) -> Serving:
    return Serving(
        sampler=sampler,
        worker_rank=worker_rank,
        device=device,
        micro_batches=config.data.micro_batches,
        seed=config.run.seed,
        loader_processes=config.data.loader_processes,
        channels_last=config.run.channels_last,
    )


def _check_target(config: Config, data: DataSet) -> None:
    target, measured = config.run.target_accuracy, data.objective.metrics
    if target is not None and "accuracy" not in measured:
        raise ConfigError(
            f"is {target}, but the data's objective measures {' and '.join(measured) or 'nothing but a loss'}, and "
            'never reaches it; leave it out, or have the objective measure "accuracy"',
            path="run.target_accuracy",
        )


def _check_fisher(config: Config, data: DataSet) -> None:
    fisher = config.preconditioner.fisher
    if fisher == "empirical" or not config.preconditioner.inverts:
        return
    if data.objective.observation(torch.zeros(1, dtype=torch.int64, device="cpu")) is None:
        raise ConfigError(
            f"is {fisher!r}, but the data's objective says nothing of its output (its observation() returns None); "
            'choose "empirical"',
            path="preconditioner.fisher",
        )

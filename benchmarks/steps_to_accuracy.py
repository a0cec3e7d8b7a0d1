"""Shows the steps to 98 % test accuracy on the digits run: rs-kfac against SGD with a tuned learning rate.

Claim: in the digits run under SGD (`optimizer.name=sgd`), rs-kfac reaches the target in fewer steps than SGD with
momentum alone at the best learning rate of a grid. The comparison favours SGD: its rate is chosen on the same seeds
that are reported, and it stays at its peak, whereas the run's schedule would decay it to nothing before SGD gets
there. rs-kfac is not tuned.

Both train the same model on the same batches in the same order (128 examples, the two ranks' batches in one process);
the test accuracy is measured after every step. rs-kfac adopts its inverses three steps late, about as a run with owners
does, by `FixedLag(3)`, so that the figures can be reproduced bit for bit. A third contender keeps all eigenpairs that
rs-kfac finds: cutting off those that damping outweighs (`direction_error`) must not cost steps.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import nn

import kfdist
from kfdist.comm.communicator import Communicator
from kfdist.config import Config, load_config
from kfdist.data.sampler import Position
from kfdist.system.provenance import versions
from kfdist.training.evaluation import evaluate
from kfdist.training.method import make_method
from kfdist.training.optimizers import LearningRate, make_optimizer, set_learning_rate
from kfdist.training.setup import gather_materials

TARGET_ACCURACY = 0.98
MAX_STEPS = 400
LAG = 3
LEARNING_RATES = (0.02, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3)
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One training run, up to the target.

    Attributes:
        method: "rs-kfac", "rs-kfac with all eigenpairs" or "sgd".
        lr: Peak learning rate.
        schedule: How it decays.
        seed: Seeds model, batches and inversions.
        steps: Steps until the target accuracy; None if it wasn't reached in `MAX_STEPS`.
        seconds: Wall-clock seconds of these steps, without the evaluations.
    """

    method: str
    lr: float
    schedule: str
    seed: int
    steps: int | None
    seconds: float


def default_config(seed: int) -> Config:
    """Returns the bundled run's configuration under SGD, the ranks' batches joined in one process."""
    config = load_config(None, environment={})
    size = config.data.batch_size * config.cluster.workers
    given = ["optimizer.name=sgd", f"run.seed={seed}", f"data.batch_size={size}"]
    return load_config(None, overrides=given, environment={})


def train_until_target(config: Config, *, second_order: bool, total_steps: int) -> tuple[int | None, float]:
    """Trains until the test accuracy has reached the target.

    Args:
        config: What to train with.
        second_order: Whether the gradients are preconditioned.
        total_steps: Steps over which the learning rate decays.

    Returns:
        The number of steps, None if more than `MAX_STEPS`, and their seconds.
    """
    device, alone = torch.device("cpu"), Communicator(None)
    materials = gather_materials(config, 1, device)
    model, data, sampler = materials.model, materials.data, materials.sampler
    optimizer = make_optimizer(config.optimizer, model.parameters())
    test = [(data.test.inputs, data.test.labels)]
    learning_rate = LearningRate(section=config.optimizer, total_steps=total_steps)
    preconditioner = make_preconditioner(model, config, learning_rate) if second_order else None
    position, seconds = sampler.start(Position()), 0.0
    try:
        for step in range(MAX_STEPS):
            started = time.perf_counter()
            set_learning_rate(optimizer, learning_rate(step))
            batch = sampler.indices(position, 0)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(data.train.inputs[batch]), data.train.labels[batch]).backward()
            if preconditioner is not None:
                preconditioner.step()
            optimizer.step()
            position = sampler.advance(position)
            seconds += time.perf_counter() - started
            if evaluate(model, test, data.objective, alone, device).metrics["accuracy"] >= TARGET_ACCURACY:
                return step + 1, seconds
    finally:
        if preconditioner is not None:
            preconditioner.close()
    return None, seconds


def make_preconditioner(
    model: nn.Module, config: Config, learning_rate: Callable[[int], float]
) -> kfdist.Preconditioner:
    """Makes the configured preconditioner for one process."""
    section = config.preconditioner
    return kfdist.Preconditioner(
        model,
        make_method(section),
        damping=section.damping,
        ema_decay=section.ema_decay,
        factor_period=section.factor_period,
        inverse_period=section.inverse_period,
        kl_clip=section.kl_clip or None,
        lr=learning_rate,
        adoption=kfdist.FixedLag(LAG),
        seed=config.run.seed,
    )


def run_second_order(seed: int, *, all_pairs: bool = False) -> Trial:
    """Runs rs-kfac in the default configuration of `kfdist train`, perhaps with all eigenpairs that it finds."""
    config = default_config(seed)
    method = config.preconditioner.method or "several methods"
    if all_pairs:
        settings = {**config.preconditioner.settings, "direction_error": 0.0}
        section = config.preconditioner.model_copy(update={"settings": settings})
        config, method = config.model_copy(update={"preconditioner": section}), f"{method} with all eigenpairs"
    steps, seconds = train_until_target(config, second_order=True, total_steps=config.run.steps or MAX_STEPS)
    optimizer = config.optimizer
    return Trial(
        method=method,
        lr=optimizer.lr,
        schedule=optimizer.schedule,
        seed=seed,
        steps=steps,
        seconds=seconds,
    )


def run_sgd(seed: int, lr: float) -> Trial:
    """Runs SGD with the default run's momentum and weight decay, at a constant learning rate."""
    config = default_config(seed)
    optimizer = config.optimizer.model_copy(update={"lr": lr, "schedule": "constant", "name": "sgd"})
    config = config.model_copy(update={"optimizer": optimizer})
    steps, seconds = train_until_target(config, second_order=False, total_steps=config.run.steps or MAX_STEPS)
    return Trial(method="sgd", lr=lr, schedule="constant", seed=seed, steps=steps, seconds=seconds)


def median_steps(trials: Sequence[Trial]) -> float:
    """Returns the median over seeds; a trial that missed the target counts as infinite."""
    return statistics.median(float("inf") if trial.steps is None else trial.steps for trial in trials)


def report(contenders: dict[str, list[Trial]]) -> None:
    """Prints the table, the best first."""
    print(f"\nsteps to {TARGET_ACCURACY:.0%} test accuracy, by seed")
    print(f"{'':28} {'median':>8} {'s (median)':>11}  steps")
    for name, trials in sorted(contenders.items(), key=lambda item: median_steps(item[1])):
        seconds = statistics.median(trial.seconds for trial in trials)
        each = " ".join(f"{trial.steps or f'>{MAX_STEPS}':>4}" for trial in trials)
        print(f"{name:28} {median_steps(trials):8g} {seconds:11.2f}  {each}")


def write_results(trials: Sequence[Trial], medians: dict[str, float]) -> Path:
    """Writes the figures with the hardware and the versions they were measured on."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "steps_to_accuracy.json"
    content = {
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "target_accuracy": TARGET_ACCURACY,
        "max_steps": MAX_STEPS,
        "median_steps": {name: None if steps == float("inf") else steps for name, steps in medians.items()},
        "hardware": {
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "cpu": torch.backends.cpu.get_cpu_capability(),
        },
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "trials": [asdict(trial) for trial in trials],
    }
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path


def main() -> None:
    """Runs all trials, prints the table and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds, counted from 1")
    arguments = parser.parse_args()
    torch.set_num_threads(default_config(1).cluster.threads)
    seeds = range(1, arguments.seeds + 1)
    contenders = {
        "rs-kfac (default run)": [run_second_order(seed) for seed in seeds],
        "rs-kfac, all eigenpairs": [run_second_order(seed, all_pairs=True) for seed in seeds],
    }
    for lr in LEARNING_RATES:
        name = f"sgd lr={lr:g}"
        contenders[name] = [run_sgd(seed, lr) for seed in seeds]
        print(f"{name}: median {median_steps(contenders[name]):g}", flush=True)
    report(contenders)
    medians = {name: median_steps(trials) for name, trials in contenders.items()}
    print(f"\nwritten to {write_results([trial for trials in contenders.values() for trial in trials], medians)}")


if __name__ == "__main__":
    main()

"""Trains real architectures with default arguments, beside SGD, and writes the table of docs/coverage.md.

    python -m benchmarks.real_models [NAME ...]

Six steps on one batch with `kfdist.Preconditioner(model)` around SGD with momentum, and as many of SGD alone with five
seeds. Without names it trains all and writes the table; with names it prints their rows.
"""

import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

import kfdist
from benchmarks.architectures import ARCHITECTURES, Architecture, Loss
from kfdist.system.provenance import processor_field

PAGE = Path(__file__).parents[1] / "docs" / "coverage.md"
BEGIN, END = "<!-- real models: written by python -m benchmarks.real_models -->", "<!-- end of real models -->"
STEPS, SEEDS = 6, 5
HEADER = (
    "| model | parameters | blocks | share preconditioned | left out | loss after 6 steps | SGD's, mean ± spread |\n"
    "|---|---|---|---|---|---|---|"
)


@dataclass(frozen=True)
class Training:
    """What became of a model in a few steps of training.

    Attributes:
        losses: Before each step, and after the last.
        share: Of its parameters, what a block preconditions and was measured.
        blocks: How many blocks it has.
        parameters: How many numbers are trained.
        left_out: Names of the parameters without a block, with the reason.
        unmeasured: Blocks that were due and not measured, or not in all uses, with the reason.
        said: What kfdist warned of.
        seconds: It took, all in all.
    """

    losses: tuple[float, ...]
    share: float = 0.0
    blocks: int = 0
    parameters: int = 0
    left_out: tuple[tuple[str, str], ...] = ()
    unmeasured: tuple[tuple[str, str], ...] = ()
    said: tuple[str, ...] = ()
    seconds: float = 0.0


def _made(architecture: Architecture, seed: int) -> tuple[nn.Module, Loss, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model, loss_on = architecture.build().train(), architecture.batch()
    return model, loss_on, torch.optim.SGD(model.parameters(), lr=architecture.learning_rate, momentum=0.9)


def _losses(model: nn.Module, loss_on: Loss, optimizer: torch.optim.Optimizer, steps: int) -> Iterator[float]:
    """Trains, and yields the loss of each step once the step is done."""
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_on(model)
        loss.backward()
        optimizer.step()
        yield loss.item()


def _loss(model: nn.Module, loss_on: Loss) -> float:
    with torch.no_grad():
        return loss_on(model).item()


def train_with_sgd(architecture: Architecture, seed: int, steps: int = STEPS) -> Training:
    """Trains a few steps with SGD alone."""
    model, loss_on, optimizer = _made(architecture, seed)
    return Training((*_losses(model, loss_on, optimizer, steps), _loss(model, loss_on)))


def train_with_kfdist(architecture: Architecture, seed: int = 0, steps: int = STEPS) -> Training:
    """Trains the same steps with a Preconditioner that is told nothing but the model."""
    model, loss_on, optimizer = _made(architecture, seed)
    losses, unmeasured = [], {}
    begun = time.perf_counter()
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always", kfdist.KfdistWarning)
        with kfdist.Preconditioner(model).attach(optimizer) as preconditioner:
            for loss in _losses(model, loss_on, optimizer, steps):
                losses.append(loss)
                capture = preconditioner.pipeline.capture
                for block, reason in capture.unmeasured.items():
                    unmeasured[block] = f"{'not measured' if block in capture.unseen else 'in part'}: {reason}"
            coverage = preconditioner.coverage()
        losses.append(_loss(model, loss_on))
    return Training(
        losses=tuple(losses),
        share=coverage.share,
        blocks=len({row.block for row in coverage.rows} - {None}),
        parameters=coverage.trained,
        left_out=tuple((row.parameter, row.reason) for row in coverage.rows if row.block is None and row.elements),
        unmeasured=tuple(sorted(unmeasured.items())),
        said=tuple(str(each.message) for each in heard if issubclass(each.category, kfdist.KfdistWarning)),
        seconds=time.perf_counter() - begun,
    )


def sgd_losses(architecture: Architecture) -> tuple[float, float]:
    """Returns the mean and the standard deviation, over seeds, of SGD's loss after the steps."""
    last = [train_with_sgd(architecture, seed).losses[-1] for seed in range(SEEDS)]
    return statistics.mean(last), statistics.stdev(last)


def described(ours: Training) -> list[str]:
    """Returns the cells on what is covered, which are the same on every machine."""
    kinds: dict[str, list[str]] = {}
    for parameter, reason in ours.left_out:
        kinds.setdefault(reason, []).append(parameter)
    for block, how in ours.unmeasured:
        if how.partition(": ")[2] not in kinds:  # of a bias, which has its line
            kinds.setdefault(how, []).append(block)
    left_out = "; ".join(
        f"{len(names)} such as `{names[0]}`: {reason}" if len(names) > 1 else f"`{names[0]}`: {reason}"
        for reason, names in kinds.items()
    )
    return [f"{ours.parameters:,}", str(ours.blocks), f"{ours.share:.2%}", left_out or "-"]


def table_row(name: str, ours: Training, sgd: tuple[float, float]) -> str:
    """Returns a model's row."""
    return f"| {' | '.join([name, *described(ours)])} | {ours.losses[-1]:.3g} | {sgd[0]:.3g} ± {sgd[1]:.2g} |"


def measured_with() -> str:
    """Returns on what the losses were measured: they depend on it, and so does the method of each block."""
    used = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision", "transformers"))
    cpu = f"{processor_field('model name') or platform.processor()}, {os.cpu_count()} cores"
    return f"Measured {date.today()} with {used} on {cpu}, {torch.get_num_threads()} thread."


def write_table(rows: Iterable[str]) -> None:
    """Writes the table into its place on the page."""
    before, rest = PAGE.read_text().split(BEGIN)
    _, after = rest.split(END)
    PAGE.write_text("\n".join([before + BEGIN, HEADER, *rows, "", measured_with(), END + after]))


def main(names: list[str]) -> None:
    """Trains and prints; writes the page where all were trained."""
    torch.set_num_threads(1)
    rows = []
    for name in names or ARCHITECTURES:
        ours = train_with_kfdist(ARCHITECTURES[name])
        rows.append(table_row(name, ours, sgd_losses(ARCHITECTURES[name])))
        print(rows[-1], f"[{ours.seconds:.0f} s]", *(f"  warned: {text}" for text in ours.said), sep="\n", flush=True)
    if not names:
        write_table(rows)


if __name__ == "__main__":
    main(sys.argv[1:])

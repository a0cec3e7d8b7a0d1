"""`kfdist plan`: what a run will take, before anything of it starts."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kfdist.checks import choice
from kfdist.cli.options import FREE_PORTS, AsJson, ConfigFile, Overrides, load, number, whole
from kfdist.errors import ConfigError
from kfdist.system.imports import uncollected

if TYPE_CHECKING:
    import torch

    from kfdist.forecast.outline import Given


def register(app: typer.Typer) -> None:
    """Adds the command to the command line."""
    app.command("plan")(_plan)


def _plan(
    config: ConfigFile = None,
    overrides: Overrides = None,
    world: Annotated[
        int | None, typer.Option(parser=whole(least=1), metavar="N", help="Ranks; cluster.workers if not given.")
    ] = None,
    owners: Annotated[
        int | None, typer.Option(parser=whole(least=1), metavar="M", help="Owners; cluster.owners if not given.")
    ] = None,
    gpu: Annotated[
        list[str] | None,
        typer.Option("--gpu", metavar="NAME", help="A GPU that ranks might have, such as H100; repeatable."),
    ] = None,
    step_seconds: Annotated[
        float | None,
        typer.Option(
            "--step-seconds",
            parser=number(least=1e-6),
            metavar="SECONDS",
            help="How long a step takes, if that is known.",
        ),
    ] = None,
    from_run: Annotated[
        Path | None,
        typer.Option("--from-run", metavar="DIR", help="An earlier run's directory: its step time and noise scale."),
    ] = None,
    example: Annotated[
        str | None,
        typer.Option(
            "--example", metavar="SHAPE[:TYPE]", help="One input, such as 3x224x224 or 128:int64, if it isn't known."
        ),
    ] = None,
    classes: Annotated[
        int | None, typer.Option(parser=whole(least=1), metavar="N", help="Outputs of the model, if they aren't known.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what a run takes, before it starts.

    Coverage, memory, bytes, inversions, staleness, and advice. The model is made without weights and run without
    data; a small calibration measures this machine's CPU.
    """
    given = list(overrides or ())
    given += [
        f"cluster.{name}={count}" for name, count in (("workers", world), ("owners", owners)) if count is not None
    ]
    checked = load(config, given, defaults=FREE_PORTS)
    with uncollected():
        from kfdist.forecast.forecast import make_forecast
        from kfdist.forecast.step_time import GPUS

    for name in gpu or ():
        choice("--gpu", name.upper(), GPUS, hint="of others, --step-seconds says how long a step takes")
    forecast = make_forecast(
        checked, _given(example, classes), step_seconds=step_seconds, from_run=from_run, gpus=gpu or ()
    )
    if as_json:
        print(json.dumps(forecast.to_json()))
        return
    from kfdist.cli.plan_display import print_forecast

    print_forecast(forecast)


def _given(example: str | None, classes: int | None) -> "Given":
    from kfdist.forecast.outline import Given

    if example is None:
        return Given(classes=classes)
    sizes, _, kind = example.partition(":")
    if not all(size.isdigit() and int(size) > 0 for size in sizes.split("x")):
        raise ConfigError(f"{example!r} is no shape; write sizes with x between, such as 3x224x224", path="--example")
    return Given(shape=tuple(map(int, sizes.split("x"))), dtype=_dtype(kind) if kind else None, classes=classes)


def _dtype(name: str) -> "torch.dtype":
    import torch

    known = {"float32": torch.float32, "float64": torch.float64, "int64": torch.int64, "int32": torch.int32}
    return known[choice("--example", name, known)]

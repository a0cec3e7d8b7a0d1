"""`kfdist bench`: measurements, with the machine they were made on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from kfdist.cli.options import AsJson, number, whole


def register(app: typer.Typer) -> None:
    """Adds the commands to the command line."""
    bench = typer.Typer(help="Measure, and write the figures with hardware and versions.", no_args_is_help=True)
    bench.command("overhead")(_overhead)
    bench.command("stall")(_stall)
    bench.command("traffic")(_traffic)
    bench.command("target")(_target)
    bench.command("inversion")(_inversion)
    bench.command("scale")(_scale)
    bench.command("memory")(_memory)
    bench.command("papers")(_papers)
    app.add_typer(bench, name="bench")


Out = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Where the figures go, as JSON, with a plot beside it; under benchmarks/results if not given.",
    ),
]
Model = Annotated[str, typer.Option(metavar="resnet18|mlp|gpt", help="What is trained.")]
Method = Annotated[str, typer.Option(metavar="NAME", help="The preconditioner's method.")]


def _finish(
    name: str,
    measure: Callable[[], dict[str, Any]],
    describe: Callable[[dict[str, Any]], str],
    plot: Callable[[dict[str, Any]], str],
    *,
    out: Path | None,
    as_json: bool,
) -> None:
    """Measures on one thread, writes and shows."""
    from kfdist.bench.measuring import measured
    from kfdist.bench.results import DIRECTORY, write_result

    content = measured(measure)
    files = write_result(out or DIRECTORY / f"{name}.json", content, plot(content))
    if as_json:
        print(json.dumps(content))
    else:
        print(describe(content))
        print(f"written to {' and '.join(map(str, files))}")


def _overhead(
    model: Model = "resnet18",
    method: Method = "rs-kfac",
    steps: Annotated[
        int, typer.Option(parser=whole(), metavar="N", help="Steps of SGD and of kfdist that are timed.")
    ] = 500,
    inversions: Annotated[
        str,
        typer.Option(
            metavar="owner|thread", help="Who inverts on the other core: an owner, or a thread of this process."
        ),
    ] = "owner",
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Measure what a step costs beside plain SGD's.

    By turns in one process; 500 steps take some minutes. The preconditioner has its defaults. The thread that
    trains has a core of its own; all else runs on another one.
    """
    from kfdist.bench.overhead import OverheadSettings, describe, measure_overhead, plot

    settings = OverheadSettings(model=model, method=method, steps=steps, inversions=inversions)
    _finish("overhead", lambda: measure_overhead(settings), describe, plot, out=out, as_json=as_json)


def _stall(
    model: Model = "resnet18",
    method: Method = "rs-kfac",
    steps: Annotated[
        int, typer.Option(parser=whole(), metavar="N", help="Steps that are timed with and without.")
    ] = 300,
    slowdown: Annotated[
        int, typer.Option(parser=whole(), metavar="TIMES", help="How many times slower the owner is.")
    ] = 10,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Measure whether steps take longer while owners are slow.

    And what the training thread does for them.
    """
    from kfdist.bench.stall import StallSettings, describe, measure_stall, plot

    settings = StallSettings(model=model, method=method, steps=steps, slowdown=slowdown)
    _finish("stall", lambda: measure_stall(settings), describe, plot, out=out, as_json=as_json)


def _traffic(
    model: Annotated[str, typer.Option(metavar="resnet50|resnet18|mlp|gpt", help="Whose layers.")] = "resnet50",
    methods: Annotated[
        list[str] | None,
        typer.Option("--method", metavar="NAME", help="Repeatable; rs-kfac (low-rank) and kfac (dense) if not given."),
    ] = None,
    inverse_period: Annotated[
        int, typer.Option(parser=whole(), metavar="STEPS", help="Ten times the factor period.")
    ] = 100,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Count the bytes that two ranks send, on the wire.

    For the gradient and for kfdist. It takes some minutes.
    """
    from kfdist.bench.on_the_wire import TrafficSettings, describe, measure_traffic, plot

    chosen = tuple(methods) if methods else TrafficSettings.methods
    settings = TrafficSettings(model=model, methods=chosen, inverse_period=inverse_period)
    _finish("traffic", lambda: measure_traffic(settings), describe, plot, out=out, as_json=as_json)


def _target(
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--task", metavar="NAME", help="digits-autoencoder, digits-cnn, ...; repeatable; all whose data are there."
        ),
    ] = None,
    rivals: Annotated[
        list[str] | None,
        typer.Option("--rival", metavar="NAME", help="sgd, adamw, muon, rs-kfac, ...; repeatable; all if not given."),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(parser=number(), metavar="S", help="Of training, at most; a task's own if not given."),
    ] = None,
    seeds: Annotated[
        int, typer.Option(parser=whole(), metavar="N", help="How many beside the one that rates are tuned with.")
    ] = 3,
    data: Annotated[
        Path | None, typer.Option("--data", metavar="DIR", help="The folder with MNIST's four files, for its tasks.")
    ] = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Measure seconds and steps to a target, beside other optimizers.

    Learning rates are tuned for each. The digits take half an hour, text and MNIST some hours each. Trainings that
    the file has aren't done again, so that the command may be interrupted and given again.
    """
    from kfdist.bench.results import DIRECTORY, write_result
    from kfdist.bench.target_cells import describe, known_cells, plot
    from kfdist.bench.to_target import TargetSettings, measure_target

    settings = TargetSettings(
        tasks=tuple(tasks or ()), rivals=tuple(rivals or ()), seconds=seconds, seeds=seeds, folder=data
    )
    file = out or DIRECTORY / "target.json"
    known = known_cells(file)

    def keep(found: dict[str, Any]) -> None:
        write_result(file, found, plot(found))

    _finish("target", lambda: measure_target(settings, known, keep), describe, plot, out=out, as_json=as_json)


def _inversion(
    methods: Annotated[
        list[str] | None, typer.Option("--method", metavar="NAME", help="Repeatable; all if not given.")
    ] = None,
    sizes: Annotated[
        list[int] | None,
        typer.Option(
            "--size",
            parser=whole(),
            metavar="D",
            help="Size of a factor; repeatable; 1024, 2048, 4608, 9216 if not given.",
        ),
    ] = None,
    rank: Annotated[int, typer.Option(parser=whole(), metavar="R", help="Eigenpairs kept.")] = 220,
    limit: Annotated[
        float, typer.Option(parser=number(), metavar="S", help="Longest inversion that is tried, in seconds.")
    ] = 20.0,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Measure seconds and error of an inversion.

    By the size of a factor and by the rank. It takes some minutes.
    """
    from kfdist.bench.inversion import InversionSettings, describe, measure_inversion, plot

    settings = InversionSettings(
        methods=tuple(methods or ()),
        sizes=tuple(sizes) if sizes else InversionSettings.sizes,
        rank=rank,
        limit_seconds=limit,
    )
    _finish("inversion", lambda: measure_inversion(settings), describe, plot, out=out, as_json=as_json)


def _scale(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A recipe or a TOML file.")] = "imagenet-resnet50",
    ranks: Annotated[
        list[int] | None,
        typer.Option("--ranks", parser=whole(), metavar="W", help="Repeatable; 8 to 4096 if not given."),
    ] = None,
    owners: Annotated[
        list[int] | None,
        typer.Option("--owners", parser=whole(), metavar="M", help="Repeatable; 1 to 256 if not given."),
    ] = None,
    step_seconds: Annotated[
        float, typer.Option(parser=number(), metavar="S", help="Assumed of a step without kfdist.")
    ] = 0.3,
    gigabytes: Annotated[
        float, typer.Option("--gigabytes-a-second", parser=number(), metavar="GB", help="Assumed that a rank sends.")
    ] = 25.0,
    hop: Annotated[
        float, typer.Option("--hop-microseconds", parser=number(), metavar="US", help="Assumed from rank to rank.")
    ] = 5.0,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Calculate what thousands of ranks would see.

    From costs that are measured here.
    """
    from kfdist.bench.scaling import ScaleSettings, checked_numbers, describe, measure_scale, plot

    settings = ScaleSettings(
        config=config,
        ranks=checked_numbers(ranks, ScaleSettings.ranks),
        owners=checked_numbers(owners, ScaleSettings.owners),
        step_seconds=step_seconds,
        gigabytes_a_second=gigabytes,
        hop_microseconds=hop,
    )
    _finish("scale", lambda: measure_scale(settings), describe, plot, out=out, as_json=as_json)


def _memory(
    model: Model = "resnet18",
    method: Method = "rs-kfac",
    steps: Annotated[int, typer.Option(parser=whole(), metavar="N", help="Of the rank whose peak is measured.")] = 120,
    long_steps: Annotated[
        int, typer.Option(parser=whole(), metavar="N", help="Of the small model that must not grow.")
    ] = 2000,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Measure the most memory that a rank takes.

    Beside what it has to, and whether it grows in a long run.
    """
    from kfdist.bench.memory_use import MemorySettings, describe, measure_memory, plot

    settings = MemorySettings(model=model, method=method, steps=steps, long_steps=long_steps)
    _finish("memory", lambda: measure_memory(settings), describe, plot, out=out, as_json=as_json)


def _papers(
    claims: Annotated[
        list[str] | None,
        typer.Option("--claim", metavar="a|b|c|d|e", help="A claim of docs/papers.md; repeatable; all if not given."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Small sizes, in seconds: shows that it runs, not what is true.")
    ] = False,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Directory for the figures, papers_a.json and so on.")
    ] = Path("bench-results"),
    as_json: AsJson = False,
) -> None:
    """Measure what the papers claim.

    Shown, not shown, or can't be run here. All of it takes some minutes. One thread. A claim that isn't shown is a
    result like any other: the exit code is 0.
    """
    from kfdist.bench.papers import describe, run_claims

    results = []
    for content in run_claims(claims or [], quick=quick, directory=out):
        results.append(content)
        if not as_json:
            print(describe(content), flush=True)
    if as_json:
        print(json.dumps({"results": results}))
    else:
        print(f"written to {out}")

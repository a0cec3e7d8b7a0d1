"""Shows a forecast: sections of short tables, right at 80 columns."""

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kfdist.forecast.forecast import BlockForecast, Forecast, OwnerForecast
from kfdist.forecast.traffic import PURPOSES, RINGS
from kfdist.system.memory import in_words

_MOST_OWNERS_SHOWN = 8


def print_forecast(forecast: Forecast) -> None:
    """Prints it."""
    console = Console(highlight=False)
    console.print(Text(forecast.title, style="bold"))
    for remark in forecast.remarks:
        console.print(Text(f"note: {remark}", style="yellow"))
    _section(console, "Blocks")
    _print_blocks(console, forecast)
    _section(console, "Memory of a rank")
    _print_memory(console, forecast)
    _section(console, "Bytes of an average step")
    _print_traffic(console, forecast)
    if forecast.owners:
        _section(console, f"Inversions in one inverse period (this CPU, threads = {forecast.threads})")
        _print_inversions(console, forecast)
        _section(console, "Staleness")
        _print_ages(console, forecast)
    _section(console, "Advice")
    for sentence in forecast.advice:
        console.print(Text(sentence))


def _section(console: Console, title: str) -> None:
    console.print()
    console.print(Text(title, style="bold underline"))


def _table(*columns: tuple[str, str]) -> Table:
    """Makes a table of columns by head and justification; the last one takes several lines where it has to."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", show_header=any(head for head, _ in columns))
    for index, (head, justify) in enumerate(columns):
        last = index == len(columns) - 1
        table.add_column(head, justify=justify, no_wrap=not last and index > 0, overflow="fold")  # type: ignore[arg-type]
    return table


def _print_blocks(console: Console, forecast: Forecast) -> None:
    coverage = forecast.coverage
    sent = [block for block in forecast.blocks if block.seconds is not None]
    if sent:
        noted = any(block.note for block in sent)
        columns = [("BLOCK", "left"), ("METHOD", "left"), ("SIZE", "right"), ("HERE", "right"), ("BY", "right")]
        table = _table(*columns, *([("NOTE", "left")] if noted else []))
        for block in sent:
            cells = [block.name, block.method, _size(block), _seconds(block.seconds), str(block.owner)]
            table.add_row(*cells, *([block.note] if noted else []))
        console.print(table)
    own = [block for block in forecast.blocks if block.seconds is None]
    if own:
        console.print(f"{len(own)} blocks more are inverted by every rank at once: {_by_method(own)}")
    for block in own:
        if block.note:
            console.print(Text(f"  {block.name}: {block.note}"))
    left_out = coverage.left_out()
    for reason, names in _grouped(left_out.items()):
        console.print(Text(f"no block: {names}: {reason}"))
    console.print(Text(str(coverage).splitlines()[-1]))


def _by_method(blocks: Sequence[BlockForecast]) -> str:
    methods = sorted({block.method for block in blocks})
    return ", ".join(f"{sum(block.method == method for block in blocks)} {method}" for method in methods)


def _grouped(reasons: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Lists names by their reason, the first few."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons:
        names.setdefault(reason, []).append(name)
    return [
        (reason, ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else ""))
        for reason, found in names.items()
    ]


def _size(block: BlockForecast) -> str:
    size = f"{block.d_out}x{block.d_in}"
    return size if block.matrices == 1 else f"{block.matrices} x {size}"


def _print_memory(console: Console, forecast: Forecast) -> None:
    table = _table(("", "left"), ("", "right"), ("", "left"))
    for line in forecast.memory:
        words = "not known" if line.bytes is None else in_words(line.bytes)
        note = ", ".join(filter(None, ("comes and goes" if line.passing else "", line.note)))
        table.add_row(line.what, words, Text(note, style="dim"))
    table.add_row(Text("all the time", style="bold"), in_words(forecast.lasting_bytes), "")
    console.print(table)


def _print_traffic(console: Console, forecast: Forecast) -> None:
    table = _table(("PURPOSE", "left"), ("ALL RANKS", "right"), ("A RANK SENDS", "right"), ("", "left"))
    for each in forecast.traffic:
        cells = ["not known" if size is None else in_words(size) for size in (each.total, each.wire)]
        table.add_row(each.purpose, *cells, Text(PURPOSES[each.purpose], style="dim"))
    console.print(table)
    rings = ", ".join(sorted(RINGS))
    console.print(Text(f"{rings}: on a ring of W ranks each sends 2 (W - 1) / W of its part", style="dim"))


def _print_inversions(console: Console, forecast: Forecast) -> None:
    for method, seconds in forecast.by_method.items():
        console.print(f"{method}: {_seconds(seconds)} in all")
    table = _table(("BY", "right"), ("GROUPS", "right"), ("SECONDS", "right"), ("MEMORY", "right"), ("", "left"))
    most = max((owner.seconds for owner in forecast.owners), default=0.0)
    for index, owner in enumerate(forecast.owners[:_MOST_OWNERS_SHOWN]):
        table.add_row(*_owner_cells(index, owner, most))
    console.print(table)
    if len(forecast.owners) > _MOST_OWNERS_SHOWN:
        console.print(f"and {len(forecast.owners) - _MOST_OWNERS_SHOWN} more")


def _owner_cells(index: int, owner: OwnerForecast, most: float) -> list[str]:
    bar = "#" * (round(20 * owner.seconds / most) if most else 0)
    return [str(index), str(owner.groups), _seconds(owner.seconds), in_words(owner.bytes), bar]


def _print_ages(console: Console, forecast: Forecast) -> None:
    for each in forecast.ages:
        seconds = each.step_time.seconds
        if seconds is None:
            console.print(Text(f"not known: {each.step_time.source}"))
            continue
        console.print(Text(f"a step takes {_seconds(seconds)} ({each.step_time.source})"))
        ages = each.ages
        if ages is None:
            continue
        console.print(
            Text(
                f"  at most {ages.steps} steps ({_seconds(ages.steps * seconds)}), mean {ages.mean_steps:.0f}; adopted "
                f"after {ages.delay_steps} steps at most; the first step waits {_seconds(ages.first_seconds)}"
            )
        )
        busy = ", ".join(f"{share:.0%}" for share in ages.busy[:_MOST_OWNERS_SHOWN])
        replaced = f"; {ages.replaced:.0%} of the jobs are replaced by newer ones" if ages.replaced else ""
        console.print(Text(f"  busy: {busy}{replaced}"))


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    if value < 0.1:
        return f"{1000 * value:.2g} ms"
    return f"{value:.2g} s" if value < 100 else f"{value:,.0f} s"

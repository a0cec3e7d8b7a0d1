"""The table of blocks: no number is cut at any width, the stalest first, names told apart by what differs."""

import io
import math

import pytest
from rich.console import Console

from kfdist.cli.block_table import Block, age, block_table, blocks_of, rank_note, shortened, staleness_bar
from kfdist.types import MetricSample

LAYERS = ["attention.self.query", "attention.output.dense", "output.dense"]


def sample(name: str, value: float, **labels: str) -> MetricSample:
    return MetricSample(name=f"kfdist_{name}", value=value, labels=labels)


def transformer(count: int = 24) -> list[Block]:
    samples = []
    for number in range(count):
        block = f"transformer.encoder.layers.{number // 3}.{LAYERS[number % 3]}"
        samples += [
            sample("staleness_steps", (number * 37) % 113, block=block),
            sample("staleness_seconds", number * 1000.0, block=block),
            sample("block_method_info", 1, block=block, method="kfac-tridiagonal"),
            sample("inversion_rank", 4096, block=block, factor="A"),
            sample("inversion_residual", math.nan if number == 3 else 1.25e-6, block=block, factor="A"),
            sample("inversion_residual", 2.5e-6, block=block, factor="G"),
            sample("inversion_smallest_eigenvalue", -1.5e-10, block=block, factor="A"),
            sample("inversion_smallest_eigenvalue", 1.0, block=block, factor="G"),
        ]
    return blocks_of(samples)


def drawn(blocks: list[Block], width: int, *, full_bar: float = 100, **options) -> list[str]:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(block_table(blocks, width, full_bar=full_bar, **options))
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [30, 40, 60, 80, 100, 120, 160])
def test_no_number_is_cut_and_no_line_is_wrapped(width):
    blocks = transformer()
    head, *lines = drawn(blocks, width)
    assert len(lines) == len(blocks)
    assert max(map(len, [head, *lines])) <= width
    for block, line in zip(blocks, lines, strict=True):
        cells = line.split()
        assert f"{block.staleness:.0f}" in cells
        assert ("RANK" in head) is ("4096" in cells)
        assert ("RESIDUAL" in head) is ("2.5e-06" in cells or "nan" in cells)
        assert ("MIN EIG" in head) is ("-1.5e-10" in cells)
        assert ("METHOD" in head) is ("kfac-tridiagonal" in cells)
    assert all(word in head for word in ("STALE", "RANK")[: 1 + (width >= 40)])
    if width >= 80:
        assert all(word in head for word in ("STALE", "METHOD", "RANK", "RESIDUAL"))


def test_the_stalest_come_first_and_names_keep_what_differs():
    blocks = transformer()
    ages = [block.staleness for block in blocks]
    assert ages == sorted(ages, reverse=True)
    names = [line.split()[0] for line in drawn(blocks, 80)[1:]]
    assert len(set(names)) == len(names)
    assert all(name.startswith("…") for name in names)
    whole = [line.split()[0] for line in drawn(blocks, 160)[1:]]
    assert whole == [block.name for block in blocks]


def test_a_block_is_as_stale_as_its_own_period_says():
    told = {"often": (60, 20), "seldom": (100, 100), "untold": (2, None)}
    samples = [sample("staleness_steps", age, block=name) for name, (age, _) in told.items()]
    samples += [sample("update_period_steps", every, block=name) for name, (_, every) in told.items() if every]
    blocks = blocks_of(samples)
    assert [(block.name, block.periods_old) for block in blocks] == [("often", 3.0), ("untold", 2.0), ("seldom", 1.0)]
    bars = [line.count("#") for line in drawn(blocks, 80, full_bar=3, plain=True)[1:]]
    assert bars[0] == 3 * bars[2] > 0


def test_the_worst_factor_counts_and_what_was_not_measured_is_a_dash():
    blocks = blocks_of(
        [
            sample("staleness_steps", 4, block="fc"),
            sample("inversion_rank", 8, block="fc", factor="A"),
            sample("inversion_rank", 16, block="fc", factor="G"),
            sample("inversion_smallest_eigenvalue", -2.0, block="fc", factor="A"),
            sample("inversion_smallest_eigenvalue", 3.0, block="fc", factor="G"),
            sample("inversion_rank", 2, block="(closed forms)", factor="A"),
            sample("loss", 1.0),
        ]
    )
    assert [block.name for block in blocks] == ["fc", "(closed forms)"]
    fc, other = (line.split("  ") for line in drawn(blocks, 80)[1:])
    assert {"4", "16", "-2.0e+00"} <= {cell.strip() for cell in fc}
    assert other.count("-") + sum(cell.strip() == "-" for cell in other) >= 1
    assert drawn([], 80) == ["BLOCK"]


def test_it_says_of_how_many_blocks_the_rank_is_the_limit():
    def told(**limited: float) -> str:
        errors = {"a": 0.03, "b": 0.51, "c": 0.4}
        samples = [sample("inversion_direction_error", errors[name], block=name) for name in limited]
        return rank_note([*samples, *(sample("inversion_limited_by_rank", v, block=k) for k, v in limited.items())])

    assert told() == told(a=0.0, b=0.0) == ""
    assert "2 of 3 blocks" in told(a=0.0, b=1.0, c=1.0) and "up to 0.51" in told(a=0.0, b=1.0, c=1.0)
    assert "up to 0.4 of" in told(a=0.0, b=0.0, c=1.0)


def test_bars_are_full_at_the_bound_and_ascii_where_nothing_else_can_be_shown():
    assert staleness_bar(100, 100, 8).plain == "████████"
    assert staleness_bar(1000, 100, 8).plain == "████████"
    assert staleness_bar(50, 100, 8).plain == "████"
    assert staleness_bar(50, 100, 8, plain=True).plain == "####"
    assert staleness_bar(None, 100, 8).plain == staleness_bar(0, 0, 8).plain == ""
    assert [staleness_bar(value, 100, 8).style for value in (50, 60, 100)] == ["green", "yellow", "red"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (9.94, "9.9 s"), (99, "99 s"), (600, "10 min"), (9e4, "25 h"), (9e5, "10 d")]
)
def test_ages_are_told_in_a_unit_that_suits(seconds, text):
    assert age(seconds) == text


def test_long_texts_lose_their_middle():
    assert shortened("short", 5) == "short"
    assert shortened("encoder.layers.11.dense", 12) == "encod….dense"
    assert len(shortened("x" * 50, 12)) == 12
    assert shortened("abcdef", 3) == "abc"

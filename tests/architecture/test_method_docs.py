"""The README's table of methods and the pages under docs/methods say what the code says."""

import ast
import inspect
import math
import re
import sys
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch

from kfdist.config import load_config
from kfdist.curvature.auto import Auto
from kfdist.curvature.gradient_inverter import AbstractGradientInverter
from kfdist.curvature.inverters import INVERTERS
from kfdist.optim.adaptive_settings import AdaptiveSettings
from kfdist.types import BlockShape

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs" / "methods").glob("*.md"))
TEXTS = {page.name: page.read_text(encoding="utf-8") for page in PAGES}
README = (ROOT / "README.md").read_text(encoding="utf-8")

METHODS: dict[str, type] = {**INVERTERS, "auto": Auto}
DOCUMENTED: dict[str, type] = {**METHODS, "AdaptiveSettings": AdaptiveSettings}
"""Every class of settings that a page has a table of."""

TABLE_COLUMNS = ["method", "when", "an inversion costs", "memory a block", "statistics", "defaults", "source"]

WIDE = BlockShape(d_out=4000, d_in=4001)
"""A layer on which every method does what it is there for."""

ON_GRADIENTS = [name for name, kind in INVERTERS.items() if issubclass(kind, AbstractGradientInverter)]

MEASURED = {"A", "G", "a", "g", "A_next", "G_next", "a_cross", "g_cross", "mode_1", "mode_2"}
"""Sums that a row of the README's table may name."""


@dataclass(frozen=True)
class Table:
    """A table of a page: the names in backticks of the heading above it, its columns and its rows of cells."""

    owners: tuple[str, ...]
    columns: list[str]
    rows: list[list[str]]


def _cells(line: str) -> list[str]:
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]


def tables(text: str) -> list[Table]:
    found: list[Table] = []
    owners: tuple[str, ...] = ()
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if re.match(r"^#+ ", line):
            owners = tuple(re.findall(r"`([^`]+)`", line))
        if re.match(r"^\|[\s:|-]+\|$", line):
            rows = []
            for following in lines[number + 1 :]:
                if not following.startswith("|"):
                    break
                rows.append(_cells(following))
            found.append(Table(owners, _cells(lines[number - 1]), rows))
    return found


def method_table() -> dict[str, list[str]]:
    (table,) = [each for each in tables(README) if each.columns == TABLE_COLUMNS]
    return {row[0].split("`")[1]: row for row in table.rows}


def defaults_of(cls: type) -> dict[str, Any]:
    return {
        f.name: f.default_factory() if f.default_factory is not MISSING else f.default  # pyright: ignore[reportCallIssue]
        for f in fields(cls)
    }


def documented_settings(name: str) -> dict[str, str]:
    """Every setting with its default as written, from all tables that stand under a heading with the name."""
    found: dict[str, str] = {}
    for text in TEXTS.values():
        for table in tables(text):
            if table.columns[:2] == ["setting", "default"] and name in table.owners:
                for row in table.rows:
                    setting = row[0].strip("`")
                    assert setting not in found, f"{setting} of {name} stands in two tables"
                    found[setting] = row[1].strip("`")
    return found


def _value(written: str) -> Any:
    return math.inf if written == "inf" else ast.literal_eval(written)


def test_every_method_has_a_row_in_the_readme_and_nothing_else_has() -> None:
    assert list(method_table()) == list(METHODS)


def test_every_row_links_to_the_page_with_its_section() -> None:
    for name, row in method_table().items():
        (page,) = re.findall(r"\]\(docs/methods/([\w-]+\.md)\)", row[0])
        sections = {
            each for each, text in TEXTS.items() if re.search(rf"^## .*`{re.escape(name)}`", text, flags=re.MULTILINE)
        }
        assert sections == {page}, name


@pytest.mark.parametrize("name", METHODS)
def test_a_row_says_what_the_method_measures_and_defaults_to(name: str) -> None:
    row = method_table()[name]
    statistics, defaults = row[TABLE_COLUMNS.index("statistics")], row[TABLE_COLUMNS.index("defaults")]
    known = defaults_of(METHODS[name])
    for setting, written in re.findall(r"`(\w+) = ([^`]+)`", defaults):
        assert setting in known, f"{name} has no setting {setting}"
        assert _value(written) == known[setting], setting
    if name != "auto":
        named = set(re.findall(r"`(\w+)`", statistics))
        needs = _needs(name)
        assert named - MEASURED == set(), name
        assert named == (needs.sums | needs.increments), name
        assert ("rows" in statistics) == bool(needs.samples or needs.increments or needs.calibration), name


def _needs(name: str) -> Any:
    return INVERTERS[name]().needs(WIDE)


def _number(formula: str, **symbols: float) -> float:
    """Evaluates a formula as people write it, with ^ for powers and products without a sign."""
    return eval(re.sub(r"(?<=[\w)]) (?=[\w(])", " * ", formula.replace("^", "**")), {"__builtins__": {}}, dict(symbols))


@pytest.mark.parametrize("name", METHODS)
def test_a_row_s_cost_is_about_the_method_s_own_estimate(name: str) -> None:
    formula = re.match(r"(?:none; up to )?([\d^ ()+pqrnN]+)(?:$|,| a step)", method_table()[name][2])
    if formula is None:
        assert name in ("b-r-kfac", "b-kfac-c", "two-level", "auto"), "only these refer to another method's"
        return
    inverter: Any = INVERTERS[name](**({"form": "explicit"} if name == "seng" else {}))  # pyright: ignore[reportCallIssue]
    known = defaults_of(INVERTERS[name])
    r, n, N = known.get("rank", 0), known.get("increment_rows", 0), known.get("examples", 0)
    written = _number(formula[1].strip(), p=WIDE.d_out, q=WIDE.d_in, r=r, n=n, N=N)
    assert written == pytest.approx(inverter.cost(WIDE), rel=0.3)


@pytest.mark.parametrize("name", DOCUMENTED)
def test_every_setting_stands_in_its_page_with_its_default(name: str) -> None:
    expected, written = defaults_of(DOCUMENTED[name]), documented_settings(name)
    assert set(written) == set(expected)
    for setting, default in expected.items():
        value = _value(written[setting])
        equal = value == pytest.approx(default, rel=1e-12) if isinstance(default, float) else value == default
        assert equal and type(value) is type(default), f"{name}.{setting}: {written[setting]}, but it is {default!r}"


@pytest.mark.parametrize("page", TEXTS)
def test_settings_tables_are_of_methods(page: str) -> None:
    for table in tables(TEXTS[page]):
        if table.columns[:2] == ["setting", "default"]:
            assert table.owners and set(table.owners) <= set(DOCUMENTED), table


@pytest.mark.parametrize("page", TEXTS)
def test_named_tests_and_files_exist(page: str) -> None:
    text = TEXTS[page]
    for path, test in re.findall(r"`((?:tests|kfdist|benchmarks|docs)/[\w./-]+)(?:::(\w+))?`", text):
        assert (ROOT / path).exists(), path
        if test:
            assert f"def {test}(" in (ROOT / path).read_text(encoding="utf-8"), f"{path}::{test}"


def test_sources_are_those_that_the_code_names() -> None:
    code = "".join(inspect.getsource(sys.modules[cls.__module__]) for cls in METHODS.values())
    for name, row in method_table().items():
        for number in re.findall(r"\b\d{4}\.\d{5}\b", row[TABLE_COLUMNS.index("source")]):
            assert number in code, f"{name}: {number}"


def _examples(language: str) -> list[Any]:
    return [
        pytest.param(text, id=f"{page}-{number}")
        for page, whole in TEXTS.items()
        for number, text in enumerate(
            text
            for marked, text in re.findall(r"^```(\w*)\n(.*?)^```$", whole, flags=re.MULTILINE | re.DOTALL)
            if marked == language
        )
    ]


@pytest.mark.parametrize("example", _examples("python"))
def test_python_examples_run(example: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        exec(compile(example, "<example>", "exec"), {"__name__": "example"})


@pytest.mark.parametrize("example", _examples("toml"))
def test_configurations_are_valid(example: str, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(example)
    load_config(tmp_path / "run.toml", environment={})


@pytest.mark.parametrize("name", ON_GRADIENTS)
def test_a_method_on_gradients_says_where_it_was_tried(name: str) -> None:
    section = TEXTS["gradients.md"].split(f"\n## `{name}`\n")[1].split("\n## ")[0]
    assert re.search(r"^- \*\*Tried\*\* .*\[decision \d+\]", section, flags=re.MULTILINE)

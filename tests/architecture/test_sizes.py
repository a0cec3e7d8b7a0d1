"""Files and functions that fit a reader's head; what a tool generated is not for reading."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 80
MAX_PARAMETERS = 7
GENERATED = ROOT / "kfdist" / "rpc" / "_generated"

FILES = sorted(
    path
    for folder in ("kfdist", "tests", "benchmarks", "examples", "protos", "deploy")
    for path in (ROOT / folder).rglob("*.py")
    if GENERATED not in path.parents
)


def _functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def _body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Counts a function's lines from its first statement after the docstring to its end."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return (function.end_lineno or 0) - body[0].lineno + 1 if body else 0


def test_there_are_files_to_measure():
    assert ROOT / "kfdist" / "runtime" / "pipeline.py" in FILES


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path: Path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_FILE_LINES
    long = {function.name: _body_lines(function) for function in _functions(path)}
    assert {name: size for name, size in long.items() if size > MAX_FUNCTION_LINES} == {}


@pytest.mark.parametrize(
    "path", [path for path in FILES if ROOT / "kfdist" in path.parents], ids=lambda path: str(path.relative_to(ROOT))
)
def test_constructors_need_few_positional_arguments(path: Path):
    crowded = {}
    for function in _functions(path):
        # Keyword-only options are named where they are given; a crowd of positional ones is not.
        positional = [argument.arg for argument in (*function.args.posonlyargs, *function.args.args)]
        if function.name == "__init__" and len(positional) - 1 > MAX_PARAMETERS:
            crowded[function.lineno] = positional
    assert crowded == {}

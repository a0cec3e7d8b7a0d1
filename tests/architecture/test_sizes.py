"""Files and functions that fit a reader's head; what a tool generated is not for reading."""

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.support import sources
from tests.support.sources import ROOT, tree_of

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 80
MAX_PARAMETERS = 7

FILES = [
    *sources.FILES,
    *(
        path
        for folder in ("tests", "benchmarks", "examples", "protos", "deploy")
        for path in sorted((ROOT / folder).rglob("*.py"))
    ),
]


def _functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    left: list[ast.AST] = [tree_of(path)]
    while left:
        node = left.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node
        if not isinstance(node, ast.Expr | ast.Assign | ast.Return | ast.expr):  # which hold no function
            left += ast.iter_child_nodes(node)


def _body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Counts a function's lines from its first statement after the docstring to its end."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return (function.end_lineno or 0) - body[0].lineno + 1 if body else 0


def test_there_are_files_to_measure():
    assert ROOT / "kfdist" / "runtime" / "pipeline.py" in FILES


def _place(path: Path, function: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    return f"{path.relative_to(ROOT)}:{function.lineno} {function.name}"


def test_files_are_short():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {path: lines for path, lines in lengths.items() if lines > MAX_FILE_LINES} == {}


def test_functions_are_short():
    lengths = {_place(path, each): _body_lines(each) for path in FILES for each in _functions(path)}
    assert {place: lines for place, lines in lengths.items() if lines > MAX_FUNCTION_LINES} == {}


def test_constructors_need_few_positional_arguments():
    crowded = {}
    for path in sources.FILES:
        for function in _functions(path):
            # Keyword-only options are named where they are given; a crowd of positional ones is not.
            positional = [argument.arg for argument in (*function.args.posonlyargs, *function.args.args)]
            if function.name == "__init__" and len(positional) - 1 > MAX_PARAMETERS:
                crowded[_place(path, function)] = positional
    assert crowded == {}

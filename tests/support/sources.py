"""The files of the project as syntax trees; a process parses each once."""

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "kfdist"
GENERATED = PACKAGE / "rpc" / "_generated"
FILES = sorted(path for path in PACKAGE.rglob("*.py") if GENERATED not in path.parents)
"""The package's own files."""


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def nodes_of(path: Path) -> tuple[ast.AST, ...]:
    """Returns all nodes of a file's tree."""
    return tuple(ast.walk(tree_of(path)))


@cache
def calls_of(path: Path) -> tuple[tuple[str, ast.Call], ...]:
    """Returns a file's calls, each with what it calls, such as "logging.getLogger"."""
    return tuple((ast.unparse(node.func), node) for node in nodes_of(path) if isinstance(node, ast.Call))

"""The library speaks in one way: loggers named by module. Only commands print, and warnings are kfdist's own."""

import ast
from pathlib import Path

from tests.support.sources import FILES, PACKAGE, ROOT, calls_of

PRINTING = ("cli", "launch")


def _calls(path: Path, name: str) -> list[ast.Call]:
    """Returns the calls of a function, such as "print" or "logging.getLogger", in a file."""
    return [call for called, call in calls_of(path) if called == name]


def _places(name: str) -> set[str]:
    return {f"{path.relative_to(ROOT)}:{call.lineno}" for path in FILES for call in _calls(path, name)}


def test_only_commands_print() -> None:
    printing = tuple(f"kfdist/{folder}/" for folder in PRINTING)
    places = [_places(name) for name in ("print", "sys.stdout.write", "sys.stderr.write")]
    assert {place for place in set().union(*places) if not place.startswith(printing)} == set()
    assert any(place.startswith(printing) for place in places[0])


def test_loggers_are_named_by_module() -> None:
    calls = [(path, call) for path in FILES for call in _calls(path, "logging.getLogger")]
    names = {(str(path.relative_to(PACKAGE)), *map(ast.unparse, call.args)) for path, call in calls}
    assert {name for name in names if name[1:] != ("__name__",)} == {("telemetry/logging.py", "LOGGER")}


def test_nobody_logs_through_the_root_logger() -> None:
    names = [f"logging.{level}" for level in ("debug", "info", "warning", "error", "exception", "basicConfig")]
    assert set().union(*map(_places, names)) == set()


def test_every_warning_is_a_warning_of_kfdist() -> None:
    calls = [call for path in FILES for call in _calls(path, "warnings.warn")]
    assert calls
    for call in calls:
        categories = {ast.unparse(each) for each in [*call.args, *(keyword.value for keyword in call.keywords)]}
        assert "KfdistWarning" in categories, ast.unparse(call)

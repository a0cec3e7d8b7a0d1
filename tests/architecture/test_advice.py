"""What error messages advise exists: options of the command that shows them, and fields of the configuration."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import typer.main

from kfdist.cli.main import app
from kfdist.config import Config, load_config
from kfdist.training.run_directory import flat
from tests.support.sources import FILES, PACKAGE, nodes_of

EVERY_RUN = {"train", "worker", "serve", "pool"}
STEERING = {"status", "list", "watch", "pause", "resume", "set", "checkpoint", "stop", "events"}
NAMES = ("inversion", "memory", "overhead", "scale", "stall", "target", "traffic")
MEASURING = {f"bench {name}" for name in NAMES}
SHOWN_BY = {
    "cli/plan_command.py": {"plan"},
    "forecast/earlier_run.py": {"plan"},
    "forecast/outline.py": {"plan"},
    "forecast/step_time.py": {"plan"},
    "bench/contest_tasks.py": {"bench target"},
    "bench/inversion.py": {"bench inversion"},
    "bench/memory_use.py": {"bench memory"},
    "bench/overhead.py": {"bench overhead"},
    "bench/papers.py": {"bench papers"},
    "bench/results.py": MEASURING,
    "bench/scaling.py": {"bench scale"},
    "bench/stall.py": {"bench stall"},
    "bench/target_cells.py": {"bench target"},
    "bench/to_target.py": {"bench target"},
    "bench/on_the_wire.py": {"bench traffic"},
    "cli/control_commands.py": STEERING,
    "cli/find_runs.py": STEERING,
    "cli/run_target.py": STEERING,
    "cli/submit_command.py": {"submit"},
    "config/loading.py": EVERY_RUN,
    "control/client.py": STEERING,
    "report/page.py": {"report"},
    "rpc/certificates.py": {"certs init"},
    "training/run_directory.py": {"train", "worker"},
    "training/worker.py": {"train", "worker"},
    **{f"launch/submission/{name}.py": {"submit"} for name in ("room", "storage", "submit", "train_checkpoints")},
    # `kfdist train` gives its pool a directory that neither exists nor has a long name.
    "pool/ray_directory.py": {"pool"},
}
"""By file: the commands that can show its messages. A file that advises an option must be here."""

OTHERS = {"docker run": {"--shm-size"}, "ray start": {"--head"}, "ray job": {"--address"}, "Ray with": {"--num-cpus"}}
"""Options of other programs, by the words before them."""


@cache
def _texts(path: Path) -> tuple[str, ...]:
    """Returns a file's strings but for docstrings and declared options; an f-string as one, with {} for its values."""
    skipped = [node for node in nodes_of(path) if isinstance(node, ast.JoinedStr) or _declares(node)]
    inside = {id(part) for node in skipped for part in ast.walk(node)}
    texts = []
    for node in nodes_of(path):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            inside.add(id(node.value))
        elif isinstance(node, ast.JoinedStr):
            texts.append("".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            texts.append(node.value)
    return tuple(texts)


def _declares(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) in ("typer.Option", "parser.add_argument")


def _options() -> dict[str, set[str]]:
    """Returns the options of each command, by its name as it is typed."""
    found: dict[str, set[str]] = {}

    def walk(command, name: str) -> None:
        for child, inner in getattr(command, "commands", {}).items():
            walk(inner, f"{name} {child}".strip())
        found[name] = {option for parameter in command.params for option in parameter.opts}

    walk(typer.main.get_command(app), "")
    return found


GIVING = {
    "bench/measuring.py",
    "bench/plots.py",
    "bench/served.py",
    "cli/main.py",
    "doctor/gpu_checks.py",
    "launch/launcher.py",
    "report/drawing.py",
    "training/elastic_agent.py",
}
"""Files that read options, give them to a process, or name variables of a style sheet, and advise none."""


def _advice() -> list[tuple[str, str, str, str]]:
    """Returns what each file advises: its path, the words before an option, the option, and the whole text."""
    return [
        (name, text[: match.start()], match.group(), text)
        for path in FILES
        if (name := str(path.relative_to(PACKAGE))) not in GIVING
        for text in _texts(path)
        for match in re.finditer(r"(?<![\w-])--[a-z][a-z-]*", text)
    ]


def test_every_option_that_is_advised_belongs_to_the_commands_that_show_the_message() -> None:
    options, wrong = _options(), []
    advice = _advice()
    for file, before, option, text in advice:
        if any(option in theirs and words in before for words, theirs in OTHERS.items()):
            continue
        named = re.search(r"`kfdist ([a-z ]+?) $", before)  # a message may name another command with its option
        commands = {named.group(1)} if named else SHOWN_BY.get(file, set())
        if not commands or not all(option in options[command] for command in commands):
            wrong.append((file, option, text))
    assert len(advice) > 8
    assert wrong == []


def test_every_field_that_is_advised_is_in_the_configuration() -> None:
    fields = {f"{section}.{key}" for section, model in Config.model_fields.items() for key in _keys(model.annotation)}
    fields |= set(flat(load_config(None, environment={}).model_dump()))
    known = fields | {"control.sqlite"}  # a file's name
    sections = "|".join(Config.model_fields)
    named = {
        (str(path.relative_to(PACKAGE)), match.group(1))
        for path in FILES
        for text in _texts(path)
        for match in re.finditer(rf"(?<![\w./])((?:{sections})\.[a-z_]+(?:\.[a-z_]+)?)(?=[ ,;:)=]|$)", text)
    }
    free = (
        "model.settings",
        "data.settings",
        "optimizer.settings",
        "preconditioner.settings",
        "preconditioner.methods",
    )
    assert len(named) > 20
    assert {(file, name) for file, name in named if name not in known and not name.startswith(free)} == set()


def _keys(model: Any) -> Iterator[str]:
    yield from getattr(model, "model_fields", {})

"""Who may import what: the layers as import-linter sees them, and what really is in memory after an import."""

import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[2]

BACKWARDS = {
    ("kfdist.curvature.inverters.two_level", "kfdist.curvature.inverters"),
}
"""Imports that close a circle, the importing module first. The list only shrinks."""


def _modules_after(statement: str) -> set[str]:
    script = f"import sys\n{statement}\nprint('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.split())


def test_imports_go_down_only():
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout
    assert " 0 broken" in done.stdout


def test_no_module_imports_itself_by_way_of_others():
    # Imports inside functions and those for type checkers count too: to understand one module takes the other.
    graph = grimp.build_graph("kfdist", exclude_type_checking_imports=False, cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    for importer, imported in BACKWARDS:
        assert imported in imports[importer], f"{importer} no longer imports {imported}: take the pair off BACKWARDS"
        imports[importer].remove(imported)
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        pytest.fail(" is imported by ".join(error.args[1]))


def test_importing_kfdist_imports_no_other_package():
    before = _modules_after("")
    loaded = _modules_after("import kfdist") - before
    foreign = {name.partition(".")[0] for name in loaded} - {"kfdist"} - set(sys.stdlib_module_names)
    assert foreign == set()


def test_importing_kfdist_takes_no_action():
    script = """
import logging, os, signal, sys, threading, warnings

def state():
    return {
        "environment": dict(os.environ),
        "descriptors": set(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "handlers": [signal.getsignal(number) for number in signal.valid_signals()],
        "loggers": list(logging.root.handlers),
        "level": logging.root.level,
        "filters": list(warnings.filters),
        "path": list(sys.path),
        "directory": os.getcwd(),
    }

before = state()
import kfdist
after = state()
assert before == after, {key: (before[key], after[key]) for key in before if before[key] != after[key]}
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


RANK = """
import torch
import kfdist
import kfdist.training.worker
from kfdist.config import OptimizerSection
from kfdist.training.optimizers import make_optimizer, optimizer_of

model = torch.nn.Linear(2, 2)
own = kfdist.Preconditioner(model, "ekfac-adam", kl_clip=None, factor_period=1, inverse_period=1)
for optimizer in (
    make_optimizer(OptimizerSection(name="sgd"), model.parameters()),
    optimizer_of(OptimizerSection(name="kfdist"), own),
):
    optimizer.load_state_dict(optimizer.state_dict())
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(4, 2)).square().sum().backward()
        optimizer.step()
own.close()
"""
"""The compiler would be loaded by an optimizer, at its first call."""

UNUSED = {"torch._dynamo", "torch._inductor", "torch.distributed.tensor", "sympy", "sklearn", "scipy", "pandas"}
"""What torch and others load where somebody asks for it, which takes from tenths of seconds to seconds."""


# What a process of a role has in memory once it has imported everything it runs.
@pytest.mark.parametrize(
    ("role", "statement", "forbidden"),
    [
        (
            "training script",
            "import kfdist; kfdist.Preconditioner, kfdist.connect, kfdist.FixedLag",
            {"ray", "grpc", *UNUSED},
        ),
        ("rank", RANK, {"ray", "grpc", "matplotlib", *UNUSED}),
        ("launcher", "import kfdist.launch.launcher", {"ray", "grpc", "cryptography", *UNUSED}),
        ("courier", "import kfdist.links.courier.__main__", {"ray", "torch", "cryptography"}),
        ("controller", "import kfdist.control.controller", {"ray", "torch", "cryptography"}),
        ("command line", "import kfdist.cli.main", {"ray", "torch", "grpc", "sklearn", "numpy"}),
    ],
)
def test_a_process_imports_only_what_its_role_needs(role: str, statement: str, forbidden: set[str]):
    del role
    loaded = _modules_after(statement)
    assert loaded & forbidden == set()

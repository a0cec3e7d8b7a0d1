"""The scripts beside the protos, which belong to no package, as modules."""

import importlib.util
from pathlib import Path
from types import ModuleType

PROTOS = Path(__file__).parents[2] / "protos"


def load(name: str) -> ModuleType:
    """Imports protos/NAME.py anew."""
    spec = importlib.util.spec_from_file_location(name, PROTOS / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

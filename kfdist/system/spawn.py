"""This package's own programs as processes: fresh interpreters that find it however this one did."""

import os
import site
import sys
from collections.abc import Mapping
from pathlib import Path

from kfdist.errors import EnvironmentFault

PACKAGE_ROOT = str(Path(__file__).resolve().parents[2])
"""The folder that `kfdist` is imported from."""


def module_command(module: str, *arguments: str) -> list[str]:
    """Returns the command line that runs a module of this package.

    Raises:
        EnvironmentFault: Python doesn't know its own executable, as when it is embedded in another program.
    """
    if not sys.executable:
        raise EnvironmentFault(
            f"sys.executable is empty, so no process for {module} can be started; run under a python executable"
        )
    # -P: a file named like a standard module in the working directory must not be imported in its place.
    return [sys.executable, "-P", "-m", module, *arguments]


def with_package(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns an environment in which this package can be imported, before anything else of that name."""
    search = [PACKAGE_ROOT, *filter(None, [environment.get("PYTHONPATH")])]
    return {**environment, "PYTHONPATH": os.pathsep.join(search)}


def inherited_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns what children inherit: not the configuration (it is in their file), but where to find this package."""
    inherited = {
        name: value for name, value in environment.items() if not (name.startswith("KFDIST_") and "__" in name)
    }
    return inherited if PACKAGE_ROOT in site.getsitepackages() else with_package(inherited)

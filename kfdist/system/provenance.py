"""What numbers and speeds of this machine depend on: its processor, and the versions of Python and of packages."""

import os
import platform
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path

_PACKAGES = ("kfdist", "torch", "ray", "grpcio", "protobuf", "prometheus-client", "safetensors", "numpy", "pydantic")


def versions() -> dict[str, str]:
    """Returns the version of "python" and of each installed package by its name; imports none of them."""
    return dict(_installed())


@cache
def _installed() -> Mapping[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def processor_field(*names: str) -> str:
    """Returns the first field of /proc/cpuinfo that has one of `names`, such as "model name"; empty without any."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    fields = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in fields if name.strip() in names), "")


def hardware() -> dict[str, str]:
    """Returns what this machine computes on: its processor, the CPUs that this process may use, and the system."""
    return {
        "processor": processor_field("model name") or platform.processor() or "unknown",
        "CPUs": str(len(os.sched_getaffinity(0))),
        "system": platform.platform(),
    }

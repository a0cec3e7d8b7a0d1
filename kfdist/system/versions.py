"""Versions of Python and of what a run depends on."""

import platform
from importlib import metadata

_PACKAGES = ("kfdist", "torch", "ray", "grpcio", "protobuf", "prometheus-client", "safetensors", "numpy", "pydantic")


def versions() -> dict[str, str]:
    """Returns the version of "python" and of each installed package by its name; imports none of them."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found

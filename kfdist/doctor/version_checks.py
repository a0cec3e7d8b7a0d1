"""Whether Python and the packages are what kfdist was written for, and what it was tested with."""

import platform
from collections.abc import Iterable, Mapping
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from kfdist.config import Config
from kfdist.doctor.finding import Finding, failed, ok, warning

TESTED: Mapping[str, str] = {
    "torch": "2.13.0",
    "ray": "2.60.0",
    "grpcio": "1.85.1",
    "protobuf": "7.36.2",
    "prometheus-client": "0.26.0",
}
"""What the tests run on, of the packages whose versions matter most: those of constraints.txt."""

_PACKAGE = "kfdist"
_TORCHVISION = "torchvision"
_VISION = frozenset({"torchvision", "cifar-resnet18", "cifar-vgg16bn", "image-folder", "image-shards", "cifar10"})
"""Models and data sets that are made of torchvision."""


def requirements() -> list[Requirement]:
    """Returns what the installed kfdist asks for, without its extras."""
    found = [Requirement(line) for line in metadata.requires(_PACKAGE) or ()]
    return [each for each in found if each.marker is None or each.marker.evaluate({"extra": ""})]


def python_wanted() -> str:
    """Returns which versions of Python the installed kfdist takes, such as ">=3.11"."""
    fields = metadata.metadata(_PACKAGE)
    return fields["Requires-Python"] if "Requires-Python" in fields else ""


def installed(names: Iterable[str]) -> dict[str, str]:
    """Returns the versions of those packages that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def check_python(version: str, wanted: str) -> Finding:
    """Checks this Python; arguments as of `platform.python_version` and `python_wanted`."""
    if SpecifierSet(wanted).contains(version, prereleases=True):
        return ok("python", f"{version}, of {wanted or 'any'}")
    return failed("python", f"{version}; kfdist needs {wanted}", f"make an environment with Python {wanted}")


def check_packages(wanted: Iterable[Requirement], there: Mapping[str, str]) -> list[Finding]:
    """Checks the packages: all that are missing or of a wrong version, and whether the main ones were tested.

    Args:
        wanted: What kfdist asks for.
        there: Versions of what is installed.
    """
    findings = []
    for each in wanted:
        version = there.get(each.name)
        if version is None:
            findings.append(failed(each.name, "isn't installed", f'pip install "{_bare(each)}"'))
        elif not each.specifier.contains(version, prereleases=True):
            findings.append(
                failed(each.name, f"{version}; kfdist needs {each.specifier}", f'pip install "{_bare(each)}"')
            )
    for name, version in TESTED.items():
        if name not in there or any(finding.check == name for finding in findings):
            continue
        if Version(there[name]).release[:2] == Version(version).release[:2]:
            findings.append(ok(name, there[name]))
        else:
            mend = f"if something is odd, try what the tests run on: pip install {name}=={version}"
            findings.append(warning(name, f"{there[name]}; the tests run on {version}", mend))
    return findings


def _bare(requirement: Requirement) -> str:
    """Returns a requirement as pip takes it."""
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    return f"{requirement.name}{extras}{requirement.specifier}"


def check_vision(config: Config, there: Mapping[str, str]) -> list[Finding]:
    """Checks that there is torchvision, if the run's model or data are of it."""
    users = [f"{section}.name = {name!r}" for section, name in _names(config) if name in _VISION]
    if not users:
        return []
    if version := there.get(_TORCHVISION):
        return [ok(_TORCHVISION, version)]
    return [failed(_TORCHVISION, f"isn't installed; {' and '.join(users)} need it", 'pip install "kfdist[vision]"')]


def _names(config: Config) -> tuple[tuple[str, str], tuple[str, str]]:
    return ("model", config.model.name), ("data", config.data.name)


def check_versions(config: Config) -> list[Finding]:
    """Checks this process's Python and its packages, also those that only some runs need."""
    wanted = requirements()
    there = installed({*(each.name for each in wanted), *TESTED, _TORCHVISION})
    return [
        check_python(platform.python_version(), python_wanted()),
        *check_packages(wanted, there),
        *check_vision(config, there),
    ]

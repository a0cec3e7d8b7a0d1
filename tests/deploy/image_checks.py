"""What Docker would find out at a build or at the start: stages, files, extras, programs, folders, cycles, secrets."""

import re
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from typing import Any

from kfdist.config import Config
from kfdist.system.addresses import split_address
from tests.deploy.docker_checks import ROLES
from tests.deploy.files import COMPOSE, DOCKERFILE, ROOT, Files, Stage, stages

INSTRUCTIONS = {"ARG", "FROM", "RUN", "COPY", "ADD", "ENV", "WORKDIR", "USER", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT",
                "CMD", "LABEL", "SHELL", "STOPSIGNAL", "VOLUME"}  # fmt: skip
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
IGNORED = "docker/Dockerfile.dockerignore"
_SECRET = re.compile(r"PASSWORD|TOKEN|SECRET|_KEY\b", re.IGNORECASE)
_REQUIRED = re.compile(r"\$\{\w+:\?[^}]+\}")


def check_build(files: Files) -> Iterator[str]:
    found = stages(files.texts[DOCKERFILE])
    before: list[str] = []
    for name, stage in found.items():
        where = f"{DOCKERFILE}: {name}"
        for instruction, arguments in stage.instructions:
            if instruction not in INSTRUCTIONS:
                yield f"{where}: there is no instruction {instruction}"
            if instruction in ("ARG", "ENV") and _SECRET.search(arguments):
                yield f"{where}: {instruction} {arguments.split('=')[0]} would stay in the image"
        yield from (fault for line in stage.of("COPY") for fault in _check_copy(line, before, where))
        for extras in re.findall(r'"\.\[([^]]+)\]"', " ".join(stage.of("RUN"))):
            if unknown := set(extras.split(",")) - EXTRAS.keys():
                yield f"{where} installs {', '.join(sorted(unknown))}, which pyproject.toml doesn't have"
        before.append(name)
    for role in ROLES:
        yield from _check_programs(found[role])


def _check_copy(line: str, before: list[str], where: str) -> Iterator[str]:
    words = line.split()
    options = [word for word in words if word.startswith("--")]
    origins = [option.partition("=")[2] for option in options if option.startswith("--from=")]
    if origins:
        yield from (
            f"{where} copies from {origin}, which is no earlier stage" for origin in origins if origin not in before
        )
        return
    taken = [entry[1:] for entry in (ROOT / IGNORED).read_text(encoding="utf-8").splitlines() if entry.startswith("!")]
    for source in [word for word in words if not word.startswith("--")][:-1]:
        if not (ROOT / source).exists() or not any(fnmatch(source, entry) for entry in taken):
            yield f"{where} copies {source}, which isn't in the build's context"


def _check_programs(stage: Stage) -> Iterator[str]:
    where, run = f"{DOCKERFILE}: {stage.name}", " ".join(stage.of("RUN"))
    if "tini" in " ".join(stage.of("ENTRYPOINT")) and not re.search(r"apt-get install[^&]*\btini\b", run):
        yield f"{where} starts with tini, which it doesn't install"
    (work,) = stage.of("WORKDIR")
    made = re.findall(r"install --directory --owner kfdist [^&]*", run)
    for folder in (work, "/etc/kfdist/certs"):
        if not made or folder not in made[0].split():
            yield f"{where} doesn't make {folder} for kfdist's user, where a volume would be root's"


def check_compose_further(files: Files) -> Iterator[str]:
    compose = files.documents(COMPOSE)[0]
    services: dict[str, Any] = compose["services"]
    for name, service in services.items():
        where = f"{COMPOSE}: {name}"
        for variable, value in service.get("environment", {}).items():
            if _SECRET.search(variable) and not _REQUIRED.fullmatch(value):
                yield f"{where}: {variable} must come from outside, as ${{NAME:?why}}"
        if "outside" in service.get("networks", []) and not service.get("ports"):
            yield f"{where} is on the network to the outside, and serves nobody there"
        writable = [entry.split(":")[1] for entry in service.get("volumes", []) if not entry.endswith(":ro")]
        writable += [entry.split(":")[0] for entry in service.get("tmpfs", [])]
        for option in ("--state", "--ready-file"):
            for file in [
                after
                for word, after in zip(service.get("command", []), service.get("command", [])[1:], strict=False)
                if word == option
            ]:
                if not any(file.startswith(f"{place}/") for place in writable):
                    yield f"{where} writes {file}, which is on no volume"
        if name in _needed(services, name):
            yield f"{where} waits for itself"
    if compose["networks"]["kfdist"] != {"internal": True}:
        yield f"{COMPOSE}: the network kfdist must be internal: gloo and Ray don't encrypt"
    served = services["controller"]["environment"].get("KFDIST_CONTROL__METRICS_ADDRESS", "127.0.0.1:0")
    wanted = split_address(Config().control.metrics_address)[1]
    if split_address(served)[1] != wanted:
        yield f"{COMPOSE}: controller serves metrics on {served}; Prometheus asks at port {wanted}"


def _needed(services: dict[str, Any], name: str) -> set[str]:
    """Returns all services that one waits for, also through others."""
    found: set[str] = set()
    coming = list(services[name].get("depends_on", []))
    while coming:
        other = coming.pop()
        if other not in found and other in services:
            found.add(other)
            coming += services[other].get("depends_on", [])
    return found

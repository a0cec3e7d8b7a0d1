"""The Dockerfile and the compose file: pinned, confined, and with command lines that kfdist understands."""

import json
import re
import tomllib
from collections.abc import Iterator
from typing import Any

from kfdist.config import Config
from kfdist.system.addresses import split_address
from kfdist.system.credentials import TOKEN_FILE
from tests.deploy.commands import Command
from tests.deploy.files import COMPOSE, DOCKERFILE, ROOT, Files, Stage, stages

ROLES = ("controller", "owner", "worker")
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
CERTIFICATES = "KFDIST_SECURITY__CERTIFICATES"
USER = "10001:10001"


def image_fault(image: str) -> str:
    """Returns what is wrong with the name of an image, or an empty string."""
    name, _, tag = image.partition(":")
    if name in {f"kfdist/{role}" for role in ROLES}:
        return "" if tag == VERSION else f"image {image} isn't of this version, {VERSION}"
    if not re.match(r"v?\d+\.\d+", tag):
        return f"image {image} isn't pinned to a version"
    return f"image {image} names a registry's host" if "." in name.partition("/")[0] else ""


def packages_of_controller(text: str) -> set[str]:
    """Returns what the controller's image installs by name."""
    (command,) = (run for run in stages(text)["build-controller"].of("RUN") if "install" in run)
    words = command.partition("constraints.txt")[2].partition("&&")[0].split()
    return {word.replace("_", "-").lower() for word in words}


def check_dockerfile(files: Files) -> Iterator[str]:
    text = files.texts[DOCKERFILE]
    found = stages(text)
    arguments = dict(argument.split("=", 1) for argument in found[""].of("ARG"))
    if re.search(r"https?://|index-url", text):
        yield f"{DOCKERFILE} names a host; a package index is the builder's business"
    for name, stage in found.items():
        base = arguments.get(stage.base.strip("${}"), stage.base)
        if name and base not in found and (fault := image_fault(base)):
            yield f"{DOCKERFILE}: {name}: {fault}"
        yield from (f"{DOCKERFILE}: {name}: ADD {added}; use COPY" for added in stage.of("ADD"))
        for run in stage.of("RUN"):
            for install in re.findall(r"pip install[^&]*", run):
                if "--constraint constraints.txt" not in install and "--no-deps" not in install:
                    yield f"{DOCKERFILE}: {name}: {install.strip()!r} isn't constrained"
            if "apt-get install" in run and "rm -rf /var/lib/apt/lists" not in run:
                yield f"{DOCKERFILE}: {name} leaves apt's lists in the image"
    for role in ROLES:
        if role in found:
            yield from _check_role(found[role])
        else:
            yield f"{DOCKERFILE} has no target {role}"
    if "CUDA" not in found["worker"].base:
        yield f"{DOCKERFILE}: worker isn't made from a CUDA image"
    control = Config().control
    ports = {split_address(address)[1] for address in (control.address, control.metrics_address)}
    if {int(port) for line in found["controller"].of("EXPOSE") for port in line.split()} != ports:
        yield f"{DOCKERFILE}: controller exposes other ports than {sorted(ports)}"


def _check_role(stage: Stage) -> Iterator[str]:
    where = f"{DOCKERFILE}: {stage.name}"
    if stage.of("USER") != [USER]:
        yield f"{where} must have USER {USER}: a number, which Kubernetes can tell from root's"
    if "HOME=/tmp" not in " ".join(stage.of("ENV")):
        yield f"{where} must have HOME=/tmp, the only place that is writable in a read-only root"
    words: list[str] = []
    for instruction in ("ENTRYPOINT", "CMD"):
        listed = _exec_form(stage.of(instruction))
        if listed is None:
            yield f"{where} must have one {instruction} in exec form"
        words += listed or []
    yield from Command(where, words).faults()
    health = stage.of("HEALTHCHECK")
    listed = _exec_form([line.partition("CMD ")[2] for line in health])
    if listed is None:
        yield f"{where} must have one HEALTHCHECK in exec form"
    else:
        yield from Command(f"{where}: HEALTHCHECK", listed).faults()
        if listed[0] == "test" and listed[-1] not in words:
            yield f"{where}: HEALTHCHECK looks at {listed[-1]}, which its command doesn't write"
        asked = "KFDIST_CONTROL_ADDRESS=" in " ".join(stage.of("ENV"))
        if stage.name == "controller" and not asked:
            yield f"{where}: HEALTHCHECK asks no controller by its address, so that it is healthy without any"


def _exec_form(lines: list[str]) -> list[str] | None:
    try:
        (words,) = [json.loads(line) for line in lines]
    except ValueError:
        return None
    return words if isinstance(words, list) else None


def check_compose(files: Files) -> Iterator[str]:
    compose = files.documents(COMPOSE)[0]
    services = compose["services"]
    images = stages(files.texts[DOCKERFILE])
    commands = {}
    for name, service in services.items():
        where = f"{COMPOSE}: {name}"
        yield from _check_confined(service, where)
        yield from _check_declared(service, compose, files, where)
        for other, condition in _conditions(service):
            if other not in services:
                yield f"{where} depends on {other}, which isn't there"
            elif condition == "service_healthy" and "build" not in services[other]:
                yield f"{where} waits for the health of {other}, which has no check"
        if "build" in service:
            target = service["build"]["target"]
            if target not in images or service["image"] != f"kfdist/{target}:{VERSION}":
                yield f"{where}: image {service['image']} isn't target {target} of this version"
            entry = service.get("entrypoint") or _exec_form(images[target].of("ENTRYPOINT")) or []
            commands[name] = Command(where, [*entry, *service["command"]], service.get("environment", {}))
            yield from commands[name].faults()
    yield from _check_together(services, commands)


def _conditions(service: dict[str, Any]) -> list[tuple[str, str]]:
    needed = service.get("depends_on", {})
    if isinstance(needed, list):
        return [(name, "service_started") for name in needed]
    return [(name, value["condition"]) for name, value in needed.items()]


def _check_confined(service: dict[str, Any], where: str) -> Iterator[str]:
    if fault := image_fault(service["image"]):
        yield f"{where}: {fault}"
    if service["read_only"] is not True or service["cap_drop"] != ["ALL"] or service["user"].startswith(("0", "root")):
        yield f"{where} must have a read-only root, no capability, and a user that isn't root"
    if "build" in service and not any(entry.startswith("/tmp:") for entry in service.get("tmpfs", [])):
        yield f"{where} needs /tmp on tmpfs: Ray's directory and ready files go there"
    for port in service.get("ports", []):
        if not port.startswith("127.0.0.1:"):
            yield f"{where} publishes {port} beyond this machine"


def _check_declared(service: dict[str, Any], compose: dict[str, Any], files: Files, where: str) -> Iterator[str]:
    for entry in service.get("volumes", []):
        source = entry.split(":")[0]
        if source.startswith("."):
            if not (ROOT / "docker" / source).resolve().exists():
                yield f"{where} mounts {source}, which isn't in the repository"
        elif source not in compose["volumes"]:
            yield f"{where} mounts the volume {source}, which isn't declared"
    for network in service.get("networks", []):
        if network not in compose["networks"]:
            yield f"{where} is on the network {network}, which isn't declared"
    environment = service.get("environment", {})
    if CERTIFICATES in environment and not any(
        entry.split(":")[1] == environment[CERTIFICATES] for entry in service.get("volumes", [])
    ):
        yield f"{where}: {CERTIFICATES} is {environment[CERTIFICATES]}, where nothing is mounted"


def _check_together(services: dict[str, Any], commands: dict[str, Command]) -> Iterator[str]:
    configs = {name: command.config for name, command in commands.items() if command.config is not None}
    if "controller" not in configs:
        return  # what is wrong with it was said
    serving = configs["controller"].control
    ranks = [name for name, command in commands.items() if command.parsed is not None]
    for name in ("owners", *ranks):
        if name in configs and configs[name].control.address != f"controller:{split_address(serving.address)[1]}":
            yield f"{COMPOSE}: {name} looks for the controller at {configs[name].control.address}"
    if "owners" in configs and configs["owners"].cluster.owner_address != "node":
        yield f"{COMPOSE}: owners listen on loopback, where ranks don't reach them"
    for name in ranks:
        parsed, host = commands[name].parsed, commands[name].parsed.rdzv_endpoint.partition(":")[0]
        if int(parsed.nnodes) != len(ranks):
            yield f"{COMPOSE}: {name} waits for {parsed.nnodes} nodes, and there are {len(ranks)}"
        if services.get(host, {}).get("hostname") != host:
            yield f"{COMPOSE}: {name} meets the others at {host}, which is no service of that hostname"
    if set(re.findall(r"cp .*", services["certs"]["command"][0])[0].split()[2:-1]) != {
        f"/etc/kfdist/authority/{name}" for name in ("*.pem", TOKEN_FILE)
    }:
        yield f"{COMPOSE}: certs must copy *.pem and token, and never ca.key"

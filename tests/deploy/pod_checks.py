"""What pods need beyond being well formed: users, secrets, room, probes, and places to write."""

import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from tests.deploy.docker_checks import USER
from tests.deploy.files import Files
from tests.deploy.kubernetes_checks import commands, pods

WORK = "/var/lib/kfdist"
SECRET_MODE = 0o440
"""The secret's files belong to root and the pod's group, and kfdist takes no key that others can read."""

_UNITS = {"": 1, "m": 1e-3, **{f"{unit}i": 1024**power for power, unit in enumerate("KMGT", start=1)}}


def quantity(value: object) -> float | None:
    """Returns an amount as Kubernetes writes it, such as 250m or 4Gi; None if it isn't one."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([a-zA-Z]*)", str(value))
    return float(found[1]) * _UNITS[found[2]] if found and found[2] in _UNITS else None


def check_pods_further(files: Files) -> Iterator[str]:
    for path, found in files.objects():
        where = f"{path}: {found['kind']} {found['metadata']['name']}" if "metadata" in found else path
        for _, pod in pods(found):
            yield from _check_user(pod, where)
            yield from _check_volumes(found, pod, where)
            for container in pod["containers"]:
                yield from _check_room(container, where)
        yield from _check_kind(files, path, found, where)


def _check_user(pod: dict[str, Any], where: str) -> Iterator[str]:
    user, group = map(int, USER.split(":"))
    wanted = {"runAsUser": user, "runAsGroup": group, "fsGroup": group}
    if {name: pod["securityContext"].get(name) for name in wanted} != wanted:
        yield f"{where} must run as {wanted}: the image's user, whose group may read the secret"
    if pod.get("automountServiceAccountToken") is not False:
        yield f"{where} must not have the service account's token, which nothing of kfdist needs"


def _check_volumes(found: dict[str, Any], pod: dict[str, Any], where: str) -> Iterator[str]:
    mounts = [mount for container in pod["containers"] for mount in container.get("volumeMounts", [])]
    places = {mount["mountPath"] for mount in mounts}
    for volume in pod.get("volumes", []):
        name, secret = volume["name"], volume.get("secret")
        if name not in {mount["name"] for mount in mounts}:
            yield f"{where} has a volume {name} that nothing mounts"
        if secret is not None and secret.get("defaultMode") != SECRET_MODE:
            yield f"{where}: files of the secret must have mode {SECRET_MODE:#o}"
        if (secret is not None or "configMap" in volume) and not all(
            mount.get("readOnly") for mount in mounts if mount["name"] == name
        ):
            yield f"{where} must mount {name} for reading only"
    if WORK not in places:
        yield f"{where} needs a volume at {WORK}, where its processes work and write"
    # KubeRay gives its pods shared memory by itself; the controller needs none.
    if found["kind"] in ("Deployment", "Job") and "/dev/shm" not in places:
        yield f"{where} needs memory at /dev/shm: Ray, couriers and NCCL use it, and a container has 64 MiB"


def _check_room(container: dict[str, Any], where: str) -> Iterator[str]:
    where = f"{where}: {container['name']}"
    amounts = {kind: container["resources"].get(kind, {}) for kind in ("requests", "limits")}
    for kind, asked in amounts.items():
        for name, value in asked.items():
            if quantity(value) is None:
                yield f"{where}: {kind} of {name} are {value!r}, which is no quantity"
    for name in ("cpu", "memory"):
        least, most = (quantity(amounts[kind].get(name, "")) for kind in ("requests", "limits"))
        if name not in amounts["requests"]:
            yield f"{where} requests no {name}, so that a node may be crowded"
        elif least is not None and most is not None and least > most:
            yield f"{where} requests more {name} than it may have"


def _check_kind(files: Files, path: str, found: dict[str, Any], where: str) -> Iterator[str]:
    spec, folder = found.get("spec", {}), str(PurePosixPath(path).parent)
    probes = {name for _, pod in pods(found) for container in pod["containers"] for name in container}
    if found["kind"] == "StatefulSet":
        if spec["replicas"] != 1:
            yield f"{where} must have one replica: its state is one SQLite file"
        services = [each["metadata"]["name"] for _, each in files.objects(folder) if each["kind"] == "Service"]
        if spec["serviceName"] not in services:
            yield f"{where} names the service {spec['serviceName']}, which isn't there"
        if not {"readinessProbe", "livenessProbe"} <= probes:
            yield f"{where} needs a readinessProbe and a livenessProbe"
        for name, command in commands(files, folder).items():
            if name.startswith(where) and "Probe" in name and "KFDIST_CONTROL_ADDRESS" not in command.environment:
                yield f"{name} asks no controller by its address, so that it succeeds without any"
    elif found["kind"] == "Deployment":
        if (spec["replicas"], spec["strategy"]["type"]) != (1, "Recreate"):
            yield f"{where} must be one pool at a time: one replica, replaced by Recreate"
        if "startupProbe" not in probes:
            yield f"{where} needs a startupProbe: a pool takes a minute to come up"
        for name, command in commands(files, folder).items():
            args = [word for _, pod in pods(found) for each in pod["containers"] for word in each["args"]]
            if name.startswith(where) and "Probe" in name and command.words[-1] not in args:
                yield f"{name} looks at {command.words[-1]}, which its command doesn't write"
    elif found["kind"] == "Job":
        ((_, pod),) = pods(found)
        if pod.get("restartPolicy") not in ("OnFailure", "Never"):
            yield f"{where} can't have restartPolicy {pod.get('restartPolicy')}"
        gpus = pod["containers"][0]["resources"]["limits"].get("nvidia.com/gpu")
        ranks = [word for word in pod["containers"][0]["args"] if word.startswith("--nproc-per-node")]
        if ranks != [f"--nproc-per-node={gpus}"]:
            yield f"{where} has {gpus} GPUs a pod, and starts {' '.join(ranks)} ranks there"

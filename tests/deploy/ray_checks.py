"""KubeRay's objects among themselves: versions, groups, and the jobs that ask for them."""

import json
import re
from collections.abc import Iterator
from typing import Any

from tests.deploy.docker_checks import CERTIFICATES
from tests.deploy.files import ROOT, Files
from tests.deploy.kubernetes_checks import commands, environment

FOLDER = "deploy/kuberay"
(RAY,) = re.findall(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)


def check_ray(files: Files) -> Iterator[str]:
    (cluster,) = (found for _, found in files.objects(FOLDER) if found["kind"] == "RayCluster")
    spec = cluster["spec"]
    if spec["rayVersion"] != RAY:
        yield f"{FOLDER}: rayVersion is {spec['rayVersion']}; constraints.txt has {RAY}"
    if spec["authOptions"]["mode"] != "token":
        yield f"{FOLDER}: the cluster takes jobs without a token"
    for name, pod in (
        ("head", spec["headGroupSpec"]),
        *((each["groupName"], each) for each in spec["workerGroupSpecs"]),
    ):
        if CERTIFICATES not in environment(pod["template"]["spec"]["containers"][0]):
            yield f"{FOLDER}: the {name} has no {CERTIFICATES}, without which `kfdist submit` can't leave the head"
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    for name, group in groups.items():
        if json.loads(json.loads(group["rayStartParams"]["resources"])) != {name: 1}:
            yield f"{FOLDER}: group {name} must offer the resource that jobs know it by, and no other"
    for path, found in files.objects(FOLDER):
        if found["kind"] == "RayJob":
            if found["spec"]["clusterSelector"] != {"ray.io/cluster": cluster["metadata"]["name"]}:
                yield f"{path}: {found['metadata']['name']} is for another cluster"
            yield from _check_job(files, found, groups, path)


def _check_job(files: Files, job: dict[str, Any], groups: dict[str, Any], path: str) -> Iterator[str]:
    where, spec = f"{path}: {job['metadata']['name']}", job["spec"]
    (resource,) = json.loads(spec["entrypointResources"])
    if resource not in groups:
        yield f"{where} asks for {resource!r}, which no group offers"
        return
    limits = groups[resource]["template"]["spec"]["containers"][0]["resources"]["limits"]
    command = commands(files, FOLDER)[f"{path}: RayJob {job['metadata']['name']}"]
    list(command.faults())
    if command.parsed is not None:
        gpus = {limits.get("nvidia.com/gpu"), spec.get("entrypointNumGpus"), int(command.parsed.nproc_per_node)}
        if len(gpus) != 1:
            yield f"{where}: the trainer's GPUs, those reserved and the ranks aren't one number: {gpus}"
    elif command.config is not None:
        cluster = command.config.cluster
        if int(limits.get("cpu", 0)) < cluster.owners:
            yield f"{where}: {cluster.owners} owners need as many CPUs, and the group has {limits.get('cpu')}"
        if resource not in cluster.bundle.resources:
            yield f"{where}: owners may be placed beside ranks: cluster.bundle.resources lacks {resource!r}"

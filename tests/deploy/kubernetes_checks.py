"""Kubernetes and KubeRay: pods are confined, what objects name is there, and command lines are kfdist's."""

import json
import shlex
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from kfdist.config import Config
from kfdist.system.addresses import split_address
from kfdist.system.credentials import AUTHORITY_FILE, Role
from tests.deploy.commands import Command
from tests.deploy.docker_checks import CERTIFICATES, image_fault
from tests.deploy.files import ROOT, Files

SECRET = "kfdist-certs"
MONITORS = ("PodMonitor", "ServiceMonitor")
GRPC_PORT, METRICS_PORT = (
    split_address(address)[1] for address in (Config().control.address, Config().control.metrics_address)
)


def pods(found: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Returns (labels, pod's spec) for each template in an object."""
    spec = found.get("spec", {})
    templates = [spec["template"]] if "template" in spec else []
    if found["kind"] == "RayCluster":
        templates = [spec["headGroupSpec"]["template"], *(group["template"] for group in spec["workerGroupSpecs"])]
    return [(template.get("metadata", {}).get("labels", {}), template["spec"]) for template in templates]


def _configs(files: Files, folder: str) -> dict[str, dict[str, str]]:
    """Returns the texts of the ConfigMaps that a folder's kustomization makes, by name and file."""
    made = {}
    for found in files.documents(f"{folder}/kustomization.yaml"):
        for generator in found.get("configMapGenerator", []):
            texts = {name: files.texts.get(f"{folder}/{name}", "") for name in generator["files"]}
            made[generator["name"]] = texts
    return made


def _mounted(pod: dict[str, Any], container: dict[str, Any], configs: dict[str, dict[str, str]]) -> dict[str, str]:
    places = {mount["name"]: mount["mountPath"] for mount in container.get("volumeMounts", [])}
    return {
        f"{places[volume['name']]}/{name}": text
        for volume in pod.get("volumes", [])
        if "configMap" in volume and volume["name"] in places
        for name, text in configs.get(volume["configMap"]["name"], {}).items()
    }


def check_pods(files: Files) -> Iterator[str]:
    for path, found in files.objects():
        configs = _configs(files, str(PurePosixPath(path).parent))
        for _, pod in pods(found):
            where = f"{path}: {found['kind']} {found['metadata']['name']}"
            security = pod["securityContext"]
            if not security.get("runAsNonRoot") or security.get("seccompProfile") != {"type": "RuntimeDefault"}:
                yield f"{where} must have runAsNonRoot and seccompProfile RuntimeDefault"
            for volume in pod.get("volumes", []):
                if "configMap" in volume and volume["configMap"]["name"] not in configs:
                    yield f"{where}: no kustomization makes {volume['configMap']['name']}"
                if "secret" in volume and volume["secret"]["secretName"] != SECRET:
                    yield f"{where}: the secret is called {SECRET}, not {volume['secret']['secretName']}"
            claims = [claim["metadata"]["name"] for claim in found["spec"].get("volumeClaimTemplates", [])]
            for container in pod["containers"]:
                yield from _check_container(container, {volume["name"] for volume in pod["volumes"]} | {*claims}, where)


def _check_container(container: dict[str, Any], volumes: set[str], where: str) -> Iterator[str]:
    where = f"{where}: {container['name']}"
    security = container["securityContext"]
    if (
        security.get("allowPrivilegeEscalation") is not False
        or security.get("readOnlyRootFilesystem") is not True
        or security.get("capabilities") != {"drop": ["ALL"]}
    ):
        yield f"{where} must have a read-only root, no capability and no escalation"
    if fault := image_fault(container["image"]):
        yield f"{where}: {fault}"
    if "memory" not in container["resources"].get("limits", {}):
        yield f"{where} has no limit of memory"
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    if "/tmp" not in mounts:
        yield f"{where} needs a volume at /tmp: Ray's directory and ready files go there"
    for name in mounts.values():
        if name not in volumes:
            yield f"{where} mounts {name}, which is no volume of its pod"
    certificates = environment(container).get(CERTIFICATES)
    if certificates is not None and certificates not in mounts:
        yield f"{where}: {CERTIFICATES} is {certificates}, where nothing is mounted"


def environment(container: dict[str, Any]) -> dict[str, str]:
    return {entry["name"]: entry["value"] for entry in container.get("env", [])}


def commands(files: Files, folder: str) -> dict[str, Command]:
    """Returns all command lines of a folder's objects, by kind, name and what they are for."""
    made: dict[str, Command] = {}
    configs = _configs(files, folder)
    groups: dict[str, tuple[dict[str, str], dict[str, str]]] = {}
    jobs = []
    for path, found in files.objects(folder):
        for _, pod in pods(found):
            for container in pod["containers"]:
                name = f"{path}: {found['kind']} {found['metadata']['name']}: {container['name']}"
                variables, mounted = environment(container), _mounted(pod, container, configs)
                groups[container["name"]] = variables, mounted
                if args := container.get("args"):
                    words = args if args[0] == "torchrun" else ["kfdist", *args]
                    made[name] = Command(name, words, variables, mounted)
                for probe in ("readinessProbe", "livenessProbe", "startupProbe"):
                    if probe in container:
                        words = container[probe]["exec"]["command"]
                        made[f"{name}: {probe}"] = Command(f"{name}: {probe}", words, variables, mounted)
        if found["kind"] == "RayJob":
            jobs.append((f"{path}: RayJob {found['metadata']['name']}", found["spec"]))
    for name, spec in jobs:
        # The job's driver inherits the environment of the pod whose resource it asks for.
        (group,) = json.loads(spec["entrypointResources"])
        variables, mounted = groups.get(group, ({}, {}))
        made[name] = Command(name, shlex.split(spec["entrypoint"]), variables, mounted)
    return made


def check_commands(files: Files) -> Iterator[str]:
    for folder in ("deploy/kubernetes/service", "deploy/kubernetes/torchrun", "deploy/kuberay"):
        for name, command in commands(files, folder).items():
            yield from command.faults()
            config = command.config
            if config is None or "Probe" in name:
                continue
            host, port = split_address(config.control.address)
            if "service" in folder:
                served = split_address(config.control.metrics_address)
                if (host, port) != ("0.0.0.0", GRPC_PORT) or served != ("0.0.0.0", METRICS_PORT):
                    yield f"{name} must serve on 0.0.0.0, {GRPC_PORT} and {METRICS_PORT}"
            elif (host, port) != ("kfdist-controller", GRPC_PORT):
                yield f"{name} looks for the controller at {config.control.address}"
            elif config.cluster.owner_address != "node":
                yield f"{name}: owners listen on loopback, where ranks don't reach them"


def check_references(files: Files) -> Iterator[str]:
    """What one object says of another is so: selectors, ports, names, files."""
    found = list(files.objects())
    templates = [(labels, pod) for _, thing in found for labels, pod in pods(thing)]
    for path, thing in found:
        where, spec = f"{path}: {thing['kind']}", thing.get("spec", {})
        if thing["kind"] == "Kustomization":
            for name in thing["resources"]:
                if not (ROOT / path).parent.joinpath(name).resolve().exists():
                    yield f"{where} names {name}, which isn't there"
        elif thing["kind"] == "Service":
            yield from _check_service(spec, templates, where)
        elif thing["kind"] in MONITORS:
            yield from _check_monitor(files, thing, templates, where)
        elif thing["kind"] == "Job":
            yield from _check_job(files, thing, path)
        elif thing["kind"] == "NetworkPolicy" and spec["podSelector"].get("matchLabels", {}):
            ray = "ray.io/cluster" in spec["podSelector"]["matchLabels"]
            for port in [port["port"] for rule in spec["ingress"] for port in rule["ports"]]:
                if port not in ((8265, 8080) if ray else (METRICS_PORT,)):
                    yield f"{where} {thing['metadata']['name']} opens {port}, where nothing is served to others"


def _selected(labels: dict[str, str], templates: list[Any]) -> list[dict[str, Any]]:
    return [pod for there, pod in templates if labels.items() <= there.items()]


def _ports(pod: dict[str, Any]) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for entry in pod["containers"] for port in entry.get("ports", [])}


def _check_service(spec: dict[str, Any], templates: list[Any], where: str) -> Iterator[str]:
    selected = _selected(spec["selector"], templates)
    if not selected:
        yield f"{where} selects {spec['selector']}, which no pod has"
    for pod in selected:
        for port in spec["ports"]:
            if _ports(pod).get(port.get("targetPort", port["name"])) != port["port"]:
                yield f"{where} offers {port['port']} as {port['name']}, which its pods don't serve"


def scraped(files: Files, monitor: dict[str, Any]) -> tuple[dict[str, str], dict[str, Any]] | None:
    """Returns the labels of the pods that a monitor scrapes, and its endpoint with these pods' name of the port."""
    spec, labels = monitor["spec"], monitor["spec"]["selector"]["matchLabels"]
    if monitor["kind"] == "PodMonitor":
        (endpoint,) = spec["podMetricsEndpoints"]
        return labels, endpoint
    (endpoint,) = spec["endpoints"]
    for _, service in files.objects():
        if service["kind"] == "Service" and labels.items() <= service["metadata"].get("labels", {}).items():
            for port in service["spec"]["ports"]:
                if port["name"] == endpoint["port"]:
                    return service["spec"]["selector"], {**endpoint, "port": port.get("targetPort", port["name"])}
    return None


def _check_monitor(files: Files, monitor: dict[str, Any], templates: list[Any], where: str) -> Iterator[str]:
    found = scraped(files, monitor)
    if found is None:
        yield f"{where} scrapes a port that no service with its labels has"
        return
    labels, endpoint = found
    if "ray.io/cluster" in labels:
        return  # labels that KubeRay sets
    for pod in _selected(labels, templates) or [{"containers": []}]:
        if _ports(pod).get(endpoint["port"]) != METRICS_PORT:
            yield f"{where} scrapes port {endpoint['port']}, which isn't {METRICS_PORT} of the pods it selects"
    client = {"name": SECRET, "key": Role.CLIENT.file_name}
    wanted = {
        "serverName": Role.CONTROLLER.host_name,
        "ca": {"secret": {"name": SECRET, "key": AUTHORITY_FILE}},
        "cert": {"secret": client},
        "keySecret": client,
    }
    if endpoint.get("scheme") != "https" or endpoint.get("tlsConfig") != wanted:
        yield f"{where} must scrape over https with {wanted}"


def _check_job(files: Files, job: dict[str, Any], path: str) -> Iterator[str]:
    where, spec = f"{path}: Job", job["spec"]
    pod, folder = spec["template"]["spec"], str(PurePosixPath(path).parent)
    services = {
        found["metadata"]["name"]: found["spec"] for _, found in files.objects(folder) if found["kind"] == "Service"
    }
    (command,) = (each for name, each in commands(files, folder).items() if ": Job " in name)
    list(command.faults())
    if spec["completionMode"] != "Indexed" or spec["completions"] != spec["parallelism"]:
        yield f"{where} must be Indexed, and all its pods run at once"
    if command.parsed is None:
        return
    if int(command.parsed.nnodes) != spec["completions"]:
        yield f"{where} has {spec['completions']} pods, and torchrun waits for {command.parsed.nnodes}"
    host, port = split_address(command.parsed.rdzv_endpoint)
    service = services.get(pod.get("subdomain", ""), {})
    if service.get("clusterIP") != "None" or not service.get("publishNotReadyAddresses"):
        yield f"{where}: its subdomain is no headless service that names pods before they are ready"
    elif host != f"{job['metadata']['name']}-0.{pod['subdomain']}" or port != service["ports"][0]["port"]:
        yield f"{where}: ranks meet at {command.parsed.rdzv_endpoint}, which isn't its first pod"

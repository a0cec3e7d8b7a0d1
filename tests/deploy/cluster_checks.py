"""Who may reach whom in a cluster, and what kustomizations and KubeRay's groups leave out."""

from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from tests.deploy.files import Files
from tests.deploy.kubernetes_checks import METRICS_PORT, MONITORS, pods, scraped

NAMESPACE = "kfdist"
RAY_DASHBOARD, RAY_METRICS = 8265, 8080
RAY_START = {"num-cpus", "num-gpus", "resources", "labels", "memory", "object-store-memory"}
"""Options of `ray start` that a group may set; KubeRay sets the addresses and ports itself."""

Labelled = tuple[dict[str, str], dict[str, Any]]


def labelled_pods(files: Files) -> list[Labelled]:
    """Returns (labels, pod's spec) of all templates, those of a RayCluster with the labels that KubeRay sets."""
    found: list[Labelled] = []
    for _, thing in files.objects():
        for index, (labels, pod) in enumerate(pods(thing)):
            if thing["kind"] == "RayCluster":
                node = "worker" if index else "head"
                labels = {"ray.io/cluster": thing["metadata"]["name"], "ray.io/node-type": node, **labels}
            found.append((labels, pod))
    return found


def _selected(labels: dict[str, str], found: list[Labelled]) -> list[dict[str, Any]]:
    return [pod for there, pod in found if labels.items() <= there.items()]


def _named_ports(pod: dict[str, Any]) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for each in pod["containers"] for port in each.get("ports", [])}


def check_policies(files: Files) -> Iterator[str]:
    """Network policies select pods and open what these serve; every scrape is let in."""
    there = labelled_pods(files)
    policies = [(path, thing) for path, thing in files.objects() if thing["kind"] == "NetworkPolicy"]
    for path, policy in policies:
        where, spec = f"{path}: NetworkPolicy {policy['metadata']['name']}", policy["spec"]
        if spec["policyTypes"] != ["Ingress"]:
            yield f"{where} must be of Ingress; it is of {spec['policyTypes']}"
        selected = _selected(spec["podSelector"].get("matchLabels", {}), there)
        if not selected:
            yield f"{where} selects {spec['podSelector']}, which no pod has"
        for port in [port for rule in spec["ingress"] for port in rule.get("ports", [])]:
            served = {number for pod in selected for number in _named_ports(pod).values()}
            if port["protocol"] != "TCP" or port["port"] not in served:
                yield f"{where} opens {port['port']} of {port['protocol']}, which none of its pods serves"
    if not any(policy["spec"]["podSelector"] == {} for _, policy in policies):
        yield "deploy: no policy closes the namespace: one must select all pods"
    for path, thing in files.objects():
        if thing["kind"] in MONITORS and (found := scraped(files, thing)):
            yield from _check_scrape(f"{path}: {thing['kind']}", *found, there, [each for _, each in policies])


def _check_scrape(
    where: str,
    labels: dict[str, str],
    endpoint: dict[str, Any],
    there: list[Labelled],
    policies: list[dict[str, Any]],
) -> Iterator[str]:
    wanted = RAY_METRICS if "ray.io/cluster" in labels else METRICS_PORT
    ports = {_named_ports(pod).get(endpoint["port"]) for pod in _selected(labels, there)}
    if ports != {wanted}:
        yield f"{where} scrapes {endpoint['port']} of {labels}, which is {ports}; it must be {wanted}"
    if endpoint.get("path") != "/metrics":
        yield f"{where} scrapes {endpoint.get('path')}; metrics are at /metrics"
    opened = [
        policy
        for policy in policies
        if policy["spec"]["podSelector"].get("matchLabels") == labels
        and wanted in [port["port"] for rule in policy["spec"]["ingress"] for port in rule.get("ports", [])]
    ]
    if not opened:
        yield f"{where}: no network policy lets Prometheus in to {wanted} of {labels}"


def check_whole(files: Files) -> Iterator[str]:
    """Kustomizations take all files of their folder into the namespace, which is a restricted one."""
    for path, found in files.objects():
        if found["kind"] == "Namespace":
            labels = found["metadata"]["labels"]
            if found["metadata"]["name"] != NAMESPACE:
                yield f"{path}: the namespace is called {NAMESPACE}, not {found['metadata']['name']}"
            if labels.get("pod-security.kubernetes.io/enforce") != "restricted":
                yield f"{path}: the namespace must enforce pod security 'restricted'"
        elif found["kind"] == "Kustomization":
            if found.get("namespace") != NAMESPACE:
                yield f"{path}: its objects go to namespace {found.get('namespace')}, not {NAMESPACE}"
            folder = PurePosixPath(path).parent
            beside = {PurePosixPath(each).name for each in files.paths(rf"{folder}/[^/]*\.yaml")} - {
                PurePosixPath(path).name
            }
            if forgotten := beside - set(found["resources"]):
                yield f"{path} forgets {', '.join(sorted(forgotten))}"
            for generator in found.get("configMapGenerator", []):
                for name in generator["files"]:
                    if f"{folder}/{name}" not in files.texts:
                        yield f"{path}: {generator['name']} is made of {name}, which isn't there"
        elif found["kind"] == "RayCluster":
            yield from _check_groups(path, found["spec"])


def _check_groups(path: str, spec: dict[str, Any]) -> Iterator[str]:
    for group in [{"groupName": "head", **spec["headGroupSpec"]}, *spec["workerGroupSpecs"]]:
        where = f"{path}: group {group['groupName']}"
        if unknown := group["rayStartParams"].keys() - RAY_START:
            yield f"{where}: ray start has no {', '.join(sorted(unknown))}, or kfdist no use for it"
        if "replicas" in group and not group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]:
            yield f"{where} has {group['replicas']} replicas, not within minReplicas and maxReplicas"
    if spec["headGroupSpec"]["rayStartParams"].get("num-cpus") != "0":
        yield f"{path}: the head must have num-cpus 0, else Ray places ranks and owners there"

"""Prometheus and Grafana: what they scrape and show is what the controller serves."""

import json
import re
import runpy
from collections.abc import Iterator
from typing import Any

from kfdist.config import Config
from kfdist.system.addresses import split_address
from kfdist.system.credentials import AUTHORITY_FILE, Role
from kfdist.telemetry.metrics import METRICS, Kind
from tests.deploy.docker_checks import CERTIFICATES
from tests.deploy.files import COMPOSE, DASHBOARD, ROOT, SCRAPE, Files

METRICS_PORT = split_address(Config().control.metrics_address)[1]


def check_scrape(files: Files) -> Iterator[str]:
    services = files.documents(COMPOSE)[0]["services"]
    (scrape,) = files.documents(SCRAPE)[0]["scrape_configs"]
    directory = services["controller"]["environment"][CERTIFICATES]
    wanted = {
        "ca_file": f"{directory}/{AUTHORITY_FILE}",
        "cert_file": f"{directory}/{Role.CLIENT.file_name}",
        "key_file": f"{directory}/{Role.CLIENT.file_name}",
        "server_name": Role.CONTROLLER.host_name,
    }
    if scrape["scheme"] != "https" or scrape.get("tls_config") != wanted:
        yield f"{SCRAPE} must scrape over https with {wanted}"
    for target in scrape["static_configs"][0]["targets"]:
        host, port = split_address(target)
        if host not in services or port != METRICS_PORT:
            yield f"{SCRAPE} scrapes {target}; metrics are at controller:{METRICS_PORT}"
    mounts = dict(entry.split(":")[:2] for entry in services["prometheus"]["volumes"])
    if f"--config.file={mounts.get(f'../{SCRAPE}')}" not in services["prometheus"]["command"]:
        yield f"{COMPOSE}: prometheus doesn't read {SCRAPE}"
    if mounts.get("certs") != directory:
        yield f"{COMPOSE}: prometheus has no certificates at {directory}"


def check_grafana(files: Files) -> Iterator[str]:
    services = files.documents(COMPOSE)[0]["services"]
    source = files.documents("deploy/grafana/provisioning/datasources/prometheus.yaml")[0]["datasources"][0]
    if not any(source["url"].startswith(f"http://{name}:") for name in services):
        yield f"deploy/grafana reads from {source['url']}, which is no service of {COMPOSE}"
    path = files.documents("deploy/grafana/provisioning/dashboards/kfdist.yaml")[0]["providers"][0]["options"]["path"]
    if f"../deploy/grafana/dashboards:{path}:ro" not in services["grafana"]["volumes"]:
        yield f"{COMPOSE}: grafana doesn't find the dashboards at {path}"
    yield from check_dashboard(json.loads(files.texts[DASHBOARD]))
    if files.texts[DASHBOARD] != runpy.run_path(str(ROOT / "deploy/grafana/make_dashboard.py"))["text"]():
        yield f"{DASHBOARD} isn't what make_dashboard.py writes; run it"


def expressions(board: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in board["panels"] for target in panel["targets"]]


def check_dashboard(board: dict[str, Any]) -> Iterator[str]:
    if len({panel["id"] for panel in board["panels"]}) != len(board["panels"]):
        yield f"{DASHBOARD}: two panels have one id"
    variables = {variable["name"] for variable in board["templating"]["list"]}
    for panel in board["panels"]:
        for target in panel["targets"]:
            yield from _check_target(target, variables, f"{DASHBOARD}: {panel['title']!r}")


def _check_target(target: dict[str, Any], variables: set[str], where: str) -> Iterator[str]:
    expression = target["expr"]
    for name in re.findall(r"\$\{?(\w+)", expression):
        if name not in variables | {"__rate_interval"}:
            yield f"{where} uses ${name}, which isn't declared"
    labels = {"run", "le"}
    for name in re.findall(r"kfdist_\w+", expression):
        metric = METRICS.get(name)
        if metric is None and (part := re.fullmatch(r"(\w+)_(?:bucket|sum|count)", name)):
            metric = METRICS.get(part[1])
            metric = metric if metric is not None and metric.kind is Kind.HISTOGRAM else None
        if metric is None:
            yield f"{where} shows {name}, which kfdist doesn't export"
        else:
            labels |= set(metric.labels)
    used = set(re.findall(r"(\w+)\s*[=!]~?\"", expression)) | set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
    used |= {label.strip() for group in re.findall(r"by \(([^)]*)\)", expression) for label in group.split(",")}
    if used - labels:
        yield f"{where} uses labels {sorted(used - labels)}, which its metrics don't have"

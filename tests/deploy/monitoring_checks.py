"""Prometheus and Grafana: what they scrape and show is what the controller serves."""

import json
import re
import runpy
from collections.abc import Collection, Iterator
from typing import Any

from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from kfdist.config import Config
from kfdist.system.addresses import split_address
from kfdist.system.credentials import AUTHORITY_FILE, Role
from kfdist.telemetry.metrics import METRICS, Kind
from tests.deploy.docker_checks import CERTIFICATES
from tests.deploy.files import ALERTS, BOARD_FOLDER, COMPOSE, MONITORING, RECORDING, ROOT, SCRAPE, Files

RUNBOOK = "docs/runbook.md"
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
    folder, _, file = SCRAPE.rpartition("/")
    if f"--config.file={mounts.get(f'../{folder}')}/{file}" not in services["prometheus"]["command"]:
        yield f"{COMPOSE}: prometheus doesn't read {SCRAPE}"
    if mounts.get("certs") != directory:
        yield f"{COMPOSE}: prometheus has no certificates at {directory}"


def check_rules(files: Files) -> Iterator[str]:
    read = {f"deploy/prometheus/{name}" for name in files.documents(SCRAPE)[0]["rule_files"]}
    if read != {RECORDING, ALERTS}:
        yield f"{SCRAPE} reads the rules {sorted(read)}; it must read {RECORDING} and {ALERTS}"
    recorded = _rules(files, RECORDING)
    for rule in recorded:
        yield from _check_expression(rule["expr"], f"{RECORDING}: {rule['record']}", "")
    names = {rule["record"] for rule in recorded}
    sections = set(re.findall(r"^## (\w+)$", (ROOT / RUNBOOK).read_text(encoding="utf-8"), flags=re.MULTILINE))
    alerts = _rules(files, ALERTS)
    for rule in alerts:
        where, told = f"{ALERTS}: {rule['alert']}", rule["annotations"]
        yield from _check_expression(rule["expr"], where, told["summary"], known=names)
        if told["runbook_url"] != f"{RUNBOOK}#{rule['alert'].lower()}" or rule["alert"] not in sections:
            yield f"{where} has no section of {RUNBOOK} at {told['runbook_url']}"
        if rule["labels"].get("severity") not in ("warning", "critical"):
            yield f"{where} has no severity"
    for section in sections - {rule["alert"] for rule in alerts}:
        yield f"{RUNBOOK} has a section {section}, which is no alert"


def _rules(files: Files, path: str) -> list[dict[str, Any]]:
    return [rule for group in files.documents(path)[0]["groups"] for rule in group["rules"]]


def check_operator(files: Files) -> Iterator[str]:
    """The Prometheus operator is told the rules and times of deploy/prometheus, by what writes them from there."""
    if files.texts[MONITORING] != runpy.run_path(str(ROOT / "deploy/kubernetes/make_monitoring.py"))["text"]():
        yield f"{MONITORING} isn't what make_monitoring.py writes; run it"
    config = files.documents(SCRAPE)[0]
    (scrape,), times = config["scrape_configs"], config["global"]
    objects = files.documents(MONITORING)
    groups = [group for found in objects if found["kind"] == "PrometheusRule" for group in found["spec"]["groups"]]
    told = [rule for group in groups for rule in group["rules"]]
    if told != [*_rules(files, RECORDING), *_rules(files, ALERTS)]:
        yield f"{MONITORING} has other rules than {RECORDING} and {ALERTS}"
    for group in groups:
        if group["interval"] != times["evaluation_interval"]:
            yield f"{MONITORING} evaluates every {group['interval']}, {SCRAPE} every {times['evaluation_interval']}"
    (monitor,) = (found["spec"] for found in objects if found["kind"] == "ServiceMonitor")
    (endpoint,) = monitor["endpoints"]
    if endpoint["interval"] != times["scrape_interval"]:
        yield f"{MONITORING} scrapes every {endpoint['interval']}, {SCRAPE} every {times['scrape_interval']}"
    labels = [found["metadata"].get("labels", {}) for _, found in files.objects() if found["kind"] == "Service"]
    jobs = [has.get(monitor["jobLabel"]) for has in labels if monitor["selector"]["matchLabels"].items() <= has.items()]
    if jobs != [scrape["job_name"]]:
        yield f"{MONITORING}: the operator calls the jobs {jobs}; the alerts know one, {scrape['job_name']}"


def check_grafana(files: Files) -> Iterator[str]:
    services = files.documents(COMPOSE)[0]["services"]
    source = files.documents("deploy/grafana/provisioning/datasources/prometheus.yaml")[0]["datasources"][0]
    if not any(source["url"].startswith(f"http://{name}:") for name in services):
        yield f"deploy/grafana reads from {source['url']}, which is no service of {COMPOSE}"
    path = files.documents("deploy/grafana/provisioning/dashboards/kfdist.yaml")[0]["providers"][0]["options"]["path"]
    if f"../deploy/grafana/dashboards:{path}:ro" not in services["grafana"]["volumes"]:
        yield f"{COMPOSE}: grafana doesn't find the dashboards at {path}"
    made = runpy.run_path(str(ROOT / "deploy/grafana/make_dashboards.py"))["texts"]()
    there = {path.rpartition("/")[2]: files.texts[path] for path in files.paths(f"{BOARD_FOLDER}/.*")}
    for name in sorted(made.keys() | there.keys()):
        if made.get(name) != there.get(name):
            yield f"{BOARD_FOLDER}/{name} isn't what make_dashboards.py writes; run it"
    for name, text in there.items():
        yield from check_dashboard(json.loads(text), name)


def check_dashboard(board: dict[str, Any], file: str) -> Iterator[str]:
    register_default_plugins()
    for field in _unknown(board, json.loads(JSONEncoder().encode(Dashboard.from_json(board)))):
        yield f"{file}: grafana-foundation-sdk knows no {field}"
    if len({panel["id"] for panel in board["panels"]}) != len(board["panels"]):
        yield f"{file}: two panels have one id"
    variables = {variable["name"] for variable in board["templating"]["list"]}
    for panel in board["panels"]:
        for target in panel["targets"]:
            yield from _check_target(target, variables, f"{file}: {panel['title']!r}")


def _unknown(value: Any, known: Any, where: str = "") -> Iterator[str]:
    """Yields what of a value isn't in what the SDK's types made of it."""
    if isinstance(value, dict) and isinstance(known, dict):
        for name, inner in value.items():
            if name in known:
                yield from _unknown(inner, known[name], f"{where}.{name}")
            else:
                yield f"{where}.{name}"
    elif isinstance(value, list) and isinstance(known, list) and len(value) == len(known):
        for index, (inner, other) in enumerate(zip(value, known, strict=True)):
            yield from _unknown(inner, other, f"{where}[{index}]")
    elif value != known:
        yield f"{where} = {value!r}"


def _check_target(target: dict[str, Any], variables: set[str], where: str) -> Iterator[str]:
    for name in re.findall(r"\$\{?(\w+)", target["expr"]):
        if name not in variables | {"__rate_interval"}:
            yield f"{where} uses ${name}, which isn't declared"
    yield from _check_expression(target["expr"], where, target["legendFormat"])


def _check_expression(expression: str, where: str, text: str, known: Collection[str] = ()) -> Iterator[str]:
    """Checks the metrics and labels of an expression, and the labels of the text that is shown for its series."""
    labels = {"run", "le", "job", "instance"}
    for name in known:
        expression = expression.replace(name, "")
    for name in re.findall(r"\bkfdist_\w+", expression):
        metric = METRICS.get(name)
        if metric is None and (part := re.fullmatch(r"(\w+)_(?:bucket|sum|count)", name)):
            metric = METRICS.get(part[1])
            metric = metric if metric is not None and metric.kind is Kind.HISTOGRAM else None
        if metric is None:
            yield f"{where} shows {name}, which kfdist doesn't export"
        else:
            labels |= set(metric.labels)
    used = set(re.findall(r"(\w+)\s*[=!]~?\"", expression)) | set(re.findall(r"{{(?: \$labels\.)?(\w+) ?}}", text))
    used |= {label.strip() for group in re.findall(r"(?:by|on) \(([^)]*)\)", expression) for label in group.split(",")}
    if used - labels:
        yield f"{where} uses labels {sorted(used - labels)}, which its metrics don't have"

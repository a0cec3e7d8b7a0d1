"""deploy/ and docker/ are consistent, and what the checks look for they find: each is shown something broken.

No container and no cluster is started: what Docker, Kubernetes, KubeRay and Grafana make of the files isn't known here.
"""

import json
import shutil
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

from tests.deploy.docker_checks import check_compose, check_dockerfile, packages_of_controller
from tests.deploy.files import (
    ALERTS,
    COMPOSE,
    DOCKERFILE,
    INVERSION_BOARD,
    MONITORING,
    RECORDING,
    ROOT,
    RUN_BOARD,
    SCRAPE,
    Check,
    Files,
)
from tests.deploy.kubernetes_checks import check_commands, check_pods, check_references
from tests.deploy.monitoring_checks import check_grafana, check_operator, check_rules, check_scrape
from tests.deploy.ray_checks import check_ray
from tests.deploy.schemas import check_kinds
from tests.support.prometheus import concrete, panels

CHECKS: tuple[Check, ...] = (
    check_kinds,
    check_dockerfile,
    check_compose,
    check_scrape,
    check_rules,
    check_operator,
    check_grafana,
    check_pods,
    check_commands,
    check_references,
    check_ray,
)
FILES = Files.load()
SERVICE, TORCHRUN, KUBERAY = "deploy/kubernetes/service", "deploy/kubernetes/torchrun", "deploy/kuberay"


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_nothing_is_wrong(check: Check):
    assert list(check(FILES)) == []


BROKEN = [
    # Kinds and fields.
    (check_kinds, f"{SERVICE}/controller.yaml", "kind: Service\n", "kind: Servise\n", "no kind 'v1 Servise'"),
    (check_kinds, f"{SERVICE}/controller.yaml", "serviceName:", "servicename:", "has no field 'servicename'"),
    (check_kinds, f"{SERVICE}/controller.yaml", "  serviceName: kfdist-controller\n", "", "has no serviceName"),
    (check_kinds, f"{TORCHRUN}/owners.yaml", "replicas: 1", 'replicas: "1"', "must be a integer"),
    (check_kinds, f"{TORCHRUN}/ranks.yaml", "Indexed", "indexed", "one of Indexed|NonIndexed"),
    (check_kinds, f"{SERVICE}/network-policy.yaml", "podSelector: {}", "podSelector: {", "isn't YAML"),
    (check_kinds, f"{KUBERAY}/rayjobs.yaml", "submissionMode: HTTPMode", "submissionMode: HTTP", "one of HTTPMode"),
    (check_kinds, f"{KUBERAY}/raycluster.yaml", "groupName", "name", "has no groupName"),
    (check_kinds, f"{KUBERAY}/pod-monitor.yaml", "podMetricsEndpoints", "endpoints", "no podMetricsEndpoints"),
    (check_kinds, COMPOSE, "    hostname: rank-1", "    host: rank-1", "has no field 'host'"),
    (check_kinds, SCRAPE, "tls_config", "tls", "has no field 'tls'"),
    # The Dockerfile.
    (check_dockerfile, DOCKERFILE, "ubuntu:24.04", "ubuntu:latest", "isn't pinned"),
    (check_dockerfile, DOCKERFILE, "ARG BASE=ubuntu", "ARG BASE=example.com/ubuntu", "names a registry's host"),
    (check_dockerfile, DOCKERFILE, "COPY kfdist ./kfdist", "ADD https://example.com/kfdist.tgz .", "names a host"),
    (check_dockerfile, DOCKERFILE, "COPY kfdist ./kfdist", "ADD kfdist ./kfdist", "use COPY"),
    (check_dockerfile, DOCKERFILE, "--no-cache-dir --constraint constraints.txt \\\n", "\\\n", "isn't constrained"),
    (check_dockerfile, DOCKERFILE, " \\\n && rm -rf /var/lib/apt/lists/*", "", "leaves apt's lists"),
    (check_dockerfile, DOCKERFILE, "USER 10001:10001", "USER kfdist", "must have USER 10001"),
    (check_dockerfile, DOCKERFILE, "USER 10001:10001\n", "", "must have USER 10001"),
    (check_dockerfile, DOCKERFILE, 'ENTRYPOINT ["tini", "--", "kfdist"]', "ENTRYPOINT kfdist", "exec form"),
    (check_dockerfile, DOCKERFILE, 'CMD ["test", "-s", "/tmp/owners.json"]', "CMD test", "HEALTHCHECK in exec form"),
    (check_dockerfile, DOCKERFILE, '"test", "-s", "/tmp/o', '"test", "-s", "/o', "its command doesn't write"),
    (check_dockerfile, DOCKERFILE, '"serve", "--state"', '"serve", "--stat"', "No such option"),
    (check_dockerfile, DOCKERFILE, '"kfdist", "status"', '"kfdist", "state"', "no command 'state'"),
    (check_dockerfile, DOCKERFILE, "EXPOSE 7070 9464", "EXPOSE 7070 9090", "exposes other ports"),
    (check_dockerfile, DOCKERFILE, "ENV HOME=/tmp", "ENV HOME=/home/kfdist", "must have HOME=/tmp"),
    (check_dockerfile, DOCKERFILE, "ENV KFDIST_CONTROL_ADDRESS=127.0.0.1:7070\n", "", "asks no controller by its"),
    (check_dockerfile, DOCKERFILE, "FROM ${CUDA_BASE}", "FROM ${BASE}", "isn't made from a CUDA image"),
    # The compose file.
    (check_compose, COMPOSE, "[pool, --ready-file", "[pool, --ready", "No such option"),
    (check_compose, COMPOSE, "OWNER_ADDRESS: node", "OWNER_ADDRES: node", "owner_addres"),
    (check_compose, COMPOSE, "KFDIST_CONTROL_ADDRESS", "KFDIST_CONTROL_ADRESS", "no variable that kfdist reads"),
    (check_compose, COMPOSE, "  KFDIST_CLUSTER__OWNER_ADDRESS: node\n", "", "owners listen on loopback"),
    (check_compose, COMPOSE, "  KFDIST_SECURITY__CERTIFICATES: /etc/kfdist/certs\n", "", "TLS and a token"),
    (check_compose, COMPOSE, "CERTIFICATES: /etc/kfdist/certs", "CERTIFICATES: /certs", "where nothing is mounted"),
    (check_compose, COMPOSE, "CONTROL__ADDRESS: controller:7070", "CONTROL__ADDRESS: controller:7071", "looks for the"),
    (check_compose, COMPOSE, '--nnodes, "2"', '--nnodes, "3"', "waits for 3 nodes"),
    (check_compose, COMPOSE, "--rdzv-backend", "--rdzv-back-end", "torchrun doesn't understand"),
    (check_compose, COMPOSE, '"rank-0:29500"', '"rank:29500"', "no service of that hostname"),
    (check_compose, COMPOSE, "kfdist certs init", "kfdist certs make", "no command 'certs make'"),
    (
        check_compose,
        COMPOSE,
        "authority/token /etc",
        "authority/token /etc/kfdist/authority/ca.key /etc",
        "never ca.key",
    ),
    (check_compose, COMPOSE, "authority/*.pem", "authority/ca.pem", "must copy *.pem and token"),
    (check_compose, COMPOSE, "read_only: true", "read_only: false", "read-only root"),
    (check_compose, COMPOSE, 'user: "10001:10001"', 'user: "0:0"', "a user that isn't root"),
    (check_compose, COMPOSE, '"127.0.0.1:3000:3000"', '"3000:3000"', "beyond this machine"),
    (check_compose, COMPOSE, "prom/prometheus:v3.5.0", "prom/prometheus", "isn't pinned"),
    (check_compose, COMPOSE, "kfdist/owner:0.1.0", "kfdist/owner:0.0.9", "isn't of this version"),
    (check_compose, COMPOSE, '    tmpfs: ["/tmp:mode=1777"] # the private Ray\'s directory, too\n', "", "needs /tmp"),
    (check_compose, COMPOSE, "owners: {condition", "owner: {condition", "depends on owner"),
    (check_compose, COMPOSE, "  control: {}\n", "", "the volume control"),
    (check_compose, COMPOSE, "../deploy/prometheus:", "../deploy/prom:", "in the repository"),
    # Prometheus and Grafana.
    (check_scrape, SCRAPE, "controller:9464", "controller:9090", "scrapes controller:9090"),
    (check_scrape, SCRAPE, "certs/client.pem", "certs/prometheus.pem", "must scrape over https with"),
    (check_scrape, SCRAPE, "server_name: controller.kfdist", "server_name: controller", "must scrape over https"),
    (check_rules, SCRAPE, "recording.yml, ", "", "must read"),
    (check_rules, RECORDING, "kfdist_steps_total", "kfdist_step_total", "which kfdist doesn't export"),
    (check_rules, ALERTS, "kfdist_nonfinite_drops_total", "kfdist_drops_total", "which kfdist doesn't export"),
    (check_rules, ALERTS, "sum by (job, run, reason)", "sum by (job, run, cause)", "labels ['cause']"),
    (check_rules, ALERTS, "$labels.state", "$labels.phase", "labels ['phase']"),
    (check_rules, ALERTS, "runbook.md#kfdistownerdown", "runbook.md#ownerdown", "has no section of docs/runbook.md"),
    (check_rules, ALERTS, "alert: KfdistOwnerDown", "alert: OwnerDown", "KfdistOwnerDown, which is no alert"),
    (check_rules, ALERTS, "severity: critical", "severity: bad", "has no severity"),
    (check_operator, MONITORING, "interval: 5s", "interval: 1s", "isn't what make_monitoring.py writes"),
    (check_operator, MONITORING, "interval: 5s", "interval: 1s", "scrapes every 1s"),
    (check_operator, MONITORING, "interval: 15s", "interval: 60s", "evaluates every 60s"),
    (check_operator, MONITORING, "alert: KfdistOwnerDown", "alert: KfdistOwnerLost", "has other rules than"),
    (check_operator, MONITORING, "expr: max by", "expr: min by", "has other rules than"),
    (check_operator, ALERTS, "for: 2m", "for: 3m", "has other rules than"),
    (check_operator, MONITORING, "jobLabel: app.kubernetes.io/name", "jobLabel: app", "calls the jobs [None]"),
    (check_grafana, INVERSION_BOARD, "kfdist_staleness_steps", "kfdist_staleness", "which kfdist doesn't export"),
    (check_grafana, INVERSION_BOARD, "kfdist_inversion_seconds_bucket", "kfdist_loss_bucket", "kfdist doesn't export"),
    (check_grafana, INVERSION_BOARD, "{{block}}", "{{layer}}", "labels ['layer']"),
    (check_grafana, RUN_BOARD, "$run", "$job", "$job, which isn't declared"),
    (check_grafana, RUN_BOARD, '"refresh": "5s"', '"refresh": "1s"', "isn't what make_dashboards.py writes"),
    (
        check_grafana,
        RUN_BOARD,
        '"showPoints"',
        '"showPoint"',
        "knows no .panels[0].fieldConfig.defaults.custom.showPoint",
    ),
    (check_grafana, RUN_BOARD, '"id": 2', '"id": 1', "two panels have one id"),
    (
        check_grafana,
        "deploy/grafana/provisioning/datasources/prometheus.yaml",
        "//prometheus:",
        "//prom:",
        "no service",
    ),
    # Kubernetes.
    (
        check_pods,
        f"{SERVICE}/controller.yaml",
        "readOnlyRootFilesystem: true",
        "readOnlyRootFilesystem: false",
        "read-only",
    ),
    (check_pods, f"{SERVICE}/controller.yaml", "runAsNonRoot: true", "runAsNonRoot: false", "must have runAsNonRoot"),
    (check_pods, f"{TORCHRUN}/ranks.yaml", "drop: [ALL]", "drop: [NET_RAW]", "no capability"),
    (check_pods, f"{TORCHRUN}/ranks.yaml", "kfdist/worker:0.1.0", "kfdist/worker:latest", "isn't of this version"),
    (check_pods, f"{TORCHRUN}/owners.yaml", "mountPath: /tmp}", "mountPath: /temp}", "needs a volume at /tmp"),
    (check_pods, f"{TORCHRUN}/owners.yaml", "{name: run, mountPath", "{name: runs, mountPath", "no volume of its pod"),
    (check_pods, f"{TORCHRUN}/owners.yaml", "secretName: kfdist-certs", "secretName: certs", "the secret is called"),
    (
        check_pods,
        f"{TORCHRUN}/kustomization.yaml",
        "name: kfdist-run",
        "name: run",
        "no kustomization makes kfdist-run",
    ),
    (check_pods, f"{KUBERAY}/raycluster.yaml", "limits: {memory: 8Gi}", "limits: {}", "no limit of memory"),
    (check_commands, f"{SERVICE}/controller.yaml", '"0.0.0.0:7070"', '"0.0.0.0:7071"', "must serve on"),
    (check_commands, f"{SERVICE}/controller.yaml", "[serve, --state", "[server, --state", "no command 'server'"),
    (check_commands, f"{TORCHRUN}/run.toml", "steps = 120", 'steps = "many"', "run.steps"),
    (check_commands, f"{TORCHRUN}/run.toml", "controller:7070", "control:7070", "looks for the controller at"),
    (check_commands, f"{TORCHRUN}/owners.yaml", "run/run.toml, --", "run.toml, --", "no file is mounted at"),
    (check_commands, f"{TORCHRUN}/ranks.yaml", "- worker", "- work", "no command 'work'"),
    (check_commands, f"{KUBERAY}/run.toml", 'owner_address = "node"', "", "owners listen on loopback"),
    (check_commands, f"{KUBERAY}/rayjobs.yaml", "-m kfdist worker", "kfdist worker", "not -m kfdist"),
    (check_references, f"{TORCHRUN}/ranks.yaml", "completions: 2", "completions: 3", "run at once"),
    (check_references, f"{TORCHRUN}/ranks.yaml", "--nnodes=2", "--nnodes=4", "torchrun waits for 4"),
    (check_references, f"{TORCHRUN}/ranks.yaml", "clusterIP: None", "type: ClusterIP", "no headless service"),
    (check_references, f"{TORCHRUN}/ranks.yaml", "kfdist-ranks-0.kfdist-ranks:29500", "kfdist:29500", "its first pod"),
    (check_references, f"{SERVICE}/controller.yaml", "containerPort: 7070", "containerPort: 7000", "pods don't serve"),
    (check_references, MONITORING, "port: metrics", "port: grpc", "scrapes port grpc"),
    (check_references, MONITORING, "port: metrics", "port: metric", "a port that no service with its labels has"),
    (check_references, MONITORING, "key: client.pem", "key: tls.pem", "must scrape over https"),
    (check_references, f"{SERVICE}/network-policy.yaml", "port: 9464", "port: 9465", "opens 9465"),
    (check_references, f"{SERVICE}/kustomization.yaml", "- monitoring.yaml", "- monitor.yaml", "which isn't there"),
    # KubeRay.
    (check_ray, f"{KUBERAY}/raycluster.yaml", "2.60.0", "2.59.0", "constraints.txt has"),
    (check_ray, f"{KUBERAY}/raycluster.yaml", "mode: token", "mode: disabled", "without a token"),
    (
        check_ray,
        f"{KUBERAY}/raycluster.yaml",
        "KFDIST_SECURITY__CERTIFICATES",
        "CERTIFICATES",
        "the head has no KFDIST",
    ),
    (check_ray, f"{KUBERAY}/raycluster.yaml", "nvidia.com/gpu: 8", "nvidia.com/gpu: 4", "aren't one number"),
    (check_ray, f"{KUBERAY}/raycluster.yaml", r"\"inverter\": 1", r"\"inverters\": 1", "must offer the resource"),
    (check_ray, f"{KUBERAY}/run.toml", "owners = 4", "owners = 5", "5 owners need as many CPUs"),
    (check_ray, f"{KUBERAY}/run.toml", "{ inverter = 0.01 }", "{}", "owners may be placed beside ranks"),
    (check_ray, f"{KUBERAY}/rayjobs.yaml", '"trainer": 1', '"gpu": 1', "which no group offers"),
    (check_ray, f"{KUBERAY}/rayjobs.yaml", "ray.io/cluster: kfdist", "ray.io/cluster: other", "for another cluster"),
]


@pytest.mark.parametrize(("check", "path", "old", "new", "found"), BROKEN)
def test_what_is_broken_is_found(check: Check, path: str, old: str, new: str, found: str):
    faults = list(check(FILES.changed(path, old, new)))
    assert any(found in fault for fault in faults), faults


def test_the_controllers_image_has_what_it_imports():
    imported = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, kfdist.cli.main, kfdist.control.controller, kfdist.control.client, kfdist.rpc.certificates;"
            "import kfdist.cli.run_display; print(*{name.partition('.')[0] for name in sys.modules})",
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    known = packages_distributions()
    needed = {known[name][0].replace("_", "-").lower() for name in imported if len(set(known.get(name, []))) == 1}
    ours = {"kfdist", "setuptools", "grpcio-tools"}  # the last by grpc, where it is there
    # What those installed by name bring with them.
    brought = {"annotated-doc", "annotated-types", "cffi", "pydantic-core", "shellingham", "typing-inspection"}
    assert {"grpcio", "pydantic", "prometheus-client"} <= needed
    assert needed - ours - brought <= packages_of_controller(FILES.texts[DOCKERFILE])


PROMTOOL = shutil.which("promtool")
ALERT_TESTS = "tests/deploy/alerts.test.yml"


@pytest.mark.skipif(PROMTOOL is None, reason="promtool isn't installed (Debian: apt-get install prometheus)")
def test_promtool_takes_the_scrape_configuration_and_what_the_dashboards_ask(tmp_path: Path):
    assert PROMTOOL is not None
    asked = [concrete(curve, run="digits", interval="1m") for panel in panels() for curve in panel.expressions]
    rules = [{"record": f"panel:{index}", "expr": expression} for index, expression in enumerate(asked)]
    (tmp_path / "rules.json").write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    for path in (SCRAPE, RECORDING, ALERTS):
        (tmp_path / Path(path).name).write_text(FILES.texts[path])
    for words in (["check", "rules", "rules.json"], ["check", "config", "--syntax-only", "prometheus.yml"]):
        done = subprocess.run([PROMTOOL, *words], cwd=tmp_path, capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(PROMTOOL is None, reason="promtool isn't installed (Debian: apt-get install prometheus)")
def test_every_alert_fires_and_stays_silent():
    assert PROMTOOL is not None
    done = subprocess.run(
        [PROMTOOL, "test", "rules", ALERT_TESTS], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    seen = [
        (look["alertname"], bool(look["exp_alerts"]))
        for test in yaml.safe_load((ROOT / ALERT_TESTS).read_text())["tests"]
        for look in test.get("alert_rule_test", [])
    ]
    alerts = [rule["alert"] for group in FILES.documents(ALERTS)[0]["groups"] for rule in group["rules"]]
    assert set(seen) == {(alert, fires) for alert in alerts for fires in (True, False)}

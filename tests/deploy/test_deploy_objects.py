"""What a cluster, Docker or a build would trip over, which the files' schemas allow: each is broken once, and found."""

import pytest

from tests.deploy.cluster_checks import check_policies, check_whole
from tests.deploy.files import COMPOSE, DOCKERFILE, MONITORING, Check, Files
from tests.deploy.image_checks import check_build, check_compose_further
from tests.deploy.pod_checks import check_pods_further, quantity

FILES = Files.load()
SERVICE, TORCHRUN, KUBERAY = "deploy/kubernetes/service", "deploy/kubernetes/torchrun", "deploy/kuberay"


@pytest.mark.parametrize("check", [check_pods_further, check_policies, check_whole, check_build, check_compose_further])
def test_nothing_is_wrong(check: Check):
    assert list(check(FILES)) == []


@pytest.mark.parametrize(
    ("text", "amount"), [("250m", 0.25), ("4Gi", 4 * 2**30), (2, 2), ("4GiB", None), ("-1", None), ("", None)]
)
def test_quantities(text: object, amount: float | None):
    assert quantity(text) == amount


BROKEN = [
    (
        check_policies,
        f"{SERVICE}/network-policy.yaml",
        "app.kubernetes.io/component: controller",
        "app.kubernetes.io/component: control",
        "selects {'matchLabels':",
    ),
    (
        check_policies,
        f"{SERVICE}/network-policy.yaml",
        "policyTypes: [Ingress]",
        "policyTypes: [Egress]",
        "must be of Ingress; it is of ['Egress']",
    ),
    (
        check_policies,
        f"{SERVICE}/network-policy.yaml",
        "protocol: TCP, port: 9464",
        "protocol: UDP, port: 9464",
        "opens 9464 of UDP, which none of its pods",
    ),
    (
        check_policies,
        f"{KUBERAY}/network-policy.yaml",
        "matchLabels: {ray.io/cluster: kfdist, ray.io/node-type: head}",
        "matchLabels: {ray.io/cluster: kfdst, ray.io/node-type: head}",
        "selects {'matchLabels': {'ray.io/cluster':",
    ),
    (
        check_policies,
        f"{KUBERAY}/network-policy.yaml",
        "ray.io/node-type: head",
        "ray.io/node-type: worker",
        "opens 8265 of TCP, which none of its pods",
    ),
    (
        check_policies,
        f"{KUBERAY}/pod-monitor.yaml",
        "ray.io/cluster: kfdist",
        "ray.io/cluster: other",
        "scrapes metrics of {'ray.io/cluster':",
    ),
    (
        check_policies,
        f"{KUBERAY}/pod-monitor.yaml",
        "port: metrics",
        "port: dashboard",
        "scrapes dashboard of {'ray.io/cluster':",
    ),
    (
        check_policies,
        MONITORING,
        "path: /metrics",
        "path: /metric",
        "scrapes /metric; metrics are at /metrics",
    ),
    (
        check_pods_further,
        f"{SERVICE}/controller.yaml",
        "serviceName: kfdist-controller",
        "serviceName: kfdist",
        "names the service kfdist, which isn't there",
    ),
    (
        check_pods_further,
        f"{SERVICE}/controller.yaml",
        "name: KFDIST_CONTROL_ADDRESS,",
        "name: KFDIST_CONTROL__DATABASE,",
        "asks no controller by its address",
    ),
    (
        check_pods_further,
        f"{SERVICE}/controller.yaml",
        "replicas: 1",
        "replicas: 2",
        "must have one replica: its state is one",
    ),
    (
        check_pods_further,
        f"{SERVICE}/controller.yaml",
        "          readinessProbe:\n"
        "            exec: {command: [kfdist, status, --json]}\n"
        "            periodSeconds: 30\n"
        "            timeoutSeconds: 15\n",
        "",
        "needs a readinessProbe and a livenessProbe",
    ),
    (
        check_pods_further,
        f"{SERVICE}/controller.yaml",
        "          livenessProbe:\n"
        "            exec: {command: [kfdist, status, --json]}\n"
        "            initialDelaySeconds: 30\n"
        "            periodSeconds: 60\n"
        "            timeoutSeconds: 15\n"
        "            failureThreshold: 5\n",
        "",
        "needs a readinessProbe and a livenessProbe",
    ),
    (
        check_pods_further,
        f"{TORCHRUN}/owners.yaml",
        "          startupProbe:\n"
        "            exec: {command: [test, -s, /tmp/owners.json]}\n"
        "            periodSeconds: 5\n"
        "            failureThreshold: 60\n",
        "",
        "needs a startupProbe: a pool takes a minute",
    ),
    (
        check_pods_further,
        f"{TORCHRUN}/owners.yaml",
        "command: [test, -s, /tmp/owners.json]",
        "command: [test, -s, /tmp/owner.json]",
        "startupProbe looks at /tmp/owner.json, which",
    ),
    (
        check_pods_further,
        f"{TORCHRUN}/ranks.yaml",
        "runAsUser: 10001",
        "runAsUser: 0",
        "must run as {'runAsUser': 10001,",
    ),
    (
        check_pods_further,
        f"{TORCHRUN}/ranks.yaml",
        "automountServiceAccountToken: false",
        "automountServiceAccountToken: true",
        "must not have the service account's token,",
    ),
    (
        check_pods_further,
        f"{TORCHRUN}/owners.yaml",
        'requests: {cpu: "2", memory: 4Gi}',
        "requests: {}",
        "requests no cpu, so that a node may be crowded",
    ),
    (
        check_pods_further,
        f"{TORCHRUN}/owners.yaml",
        "memory: 4Gi",
        "memory: 4GiB",
        "requests of memory are '4GiB', which is no",
    ),
    (
        check_pods_further,
        f"{TORCHRUN}/owners.yaml",
        "memory: 4Gi}",
        "memory: 32Gi}",
        "requests more memory than it may have",
    ),
    (check_pods_further, f"{TORCHRUN}/ranks.yaml", ", nvidia.com/gpu: 1", "", "has None GPUs a pod, and starts"),
    (
        check_pods_further,
        f"{TORCHRUN}/ranks.yaml",
        "nvidia.com/gpu: 1",
        "nvidia.com/gpu: 2",
        "has 2 GPUs a pod, and starts",
    ),
    (
        check_pods_further,
        f"{TORCHRUN}/ranks.yaml",
        "            - {name: shm, mountPath: /dev/shm}\n",
        "",
        "has a volume shm that nothing mounts",
    ),
    (
        check_pods_further,
        f"{TORCHRUN}/ranks.yaml",
        "            - {name: work, mountPath: /var/lib/kfdist}\n",
        "",
        "has a volume work that nothing mounts",
    ),
    (
        check_pods_further,
        f"{TORCHRUN}/ranks.yaml",
        "defaultMode: 0440",
        "defaultMode: 0444",
        "of the secret must have mode 0o440",
    ),
    (
        check_pods_further,
        f"{TORCHRUN}/ranks.yaml",
        "mountPath: /etc/kfdist/certs, readOnly: true",
        "mountPath: /etc/kfdist/certs, readOnly: false",
        "must mount certs for reading only",
    ),
    (check_pods_further, f"{TORCHRUN}/ranks.yaml", "        fsGroup: 10001\n", "", "must run as {'runAsUser': 10001,"),
    (
        check_whole,
        f"{SERVICE}/namespace.yaml",
        "enforce: restricted",
        "enforce: privileged",
        "the namespace must enforce pod security",
    ),
    (
        check_whole,
        f"{TORCHRUN}/kustomization.yaml",
        "namespace: kfdist\n",
        "namespace: other\n",
        "its objects go to namespace other, not kfdist",
    ),
    (check_whole, f"{TORCHRUN}/kustomization.yaml", "  - ranks.yaml\n", "", "forgets ranks.yaml"),
    (
        check_pods_further,
        f"{TORCHRUN}/ranks.yaml",
        "restartPolicy: OnFailure",
        "restartPolicy: Always",
        "can't have restartPolicy Always",
    ),
    (
        check_whole,
        f"{KUBERAY}/raycluster.yaml",
        "maxReplicas: 1",
        "maxReplicas: 0",
        "has 1 replicas, not within minReplicas and",
    ),
    (
        check_whole,
        f"{KUBERAY}/raycluster.yaml",
        'num-cpus: "0"',
        'num-cpu: "0"',
        "ray start has no num-cpu, or kfdist no use",
    ),
    (
        check_compose_further,
        COMPOSE,
        "${GRAFANA_PASSWORD:?give Grafana's admin a password}",
        "admin",
        "GF_SECURITY_ADMIN_PASSWORD must come from",
    ),
    (
        check_compose_further,
        COMPOSE,
        "kfdist: {internal: true}",
        "kfdist: {}",
        "the network kfdist must be internal: gloo and",
    ),
    (
        check_compose_further,
        COMPOSE,
        "      certs: {condition: service_completed_successfully}",
        "      owners: {condition: service_healthy}",
        "waits for itself",
    ),
    (
        check_compose_further,
        COMPOSE,
        "KFDIST_CONTROL__METRICS_ADDRESS: 0.0.0.0:9464",
        "KFDIST_CONTROL__METRICS_ADDRESS: 0.0.0.0:9465",
        "serves metrics on 0.0.0.0:9465; Prometheus",
    ),
    (
        check_compose_further,
        COMPOSE,
        "--state, /var/lib/kfdist/control.sqlite",
        "--state, /srv/control.sqlite",
        "writes /srv/control.sqlite, which is on no",
    ),
    (
        check_build,
        DOCKERFILE,
        "COPY --from=build-controller /opt/kfdist /opt/kfdist",
        "COPY --from=build-control /opt/kfdist /opt/kfdist",
        "copies from build-control, which is no",
    ),
    (
        check_build,
        DOCKERFILE,
        "COPY constraints.txt pyproject.toml README.md LICENSE ./",
        "COPY constraints.txt pyproject.toml README.md LICENCE ./",
        "copies LICENCE, which isn't in the build's",
    ),
    (
        check_build,
        DOCKERFILE,
        "/var/lib/kfdist /etc/kfdist/authority /etc/kfdist/certs\n",
        "/var/lib/kfdists /etc/kfdist/authority /etc/kfdist/certs\n",
        "doesn't make /var/lib/kfdist for kfdist's",
    ),
    (check_build, DOCKERFILE, "ARG BASE=", "ARG PIP_PASSWORD=x\nARG BASE=", "ARG PIP_PASSWORD would stay in the image"),
    (check_build, DOCKERFILE, "WORKDIR /src", "WORKDIRS /src", "there is no instruction WORKDIRS"),
    (check_build, DOCKERFILE, '".[submit,vision]"', '".[submit,visions]"', "-training installs visions, which"),
    (check_build, DOCKERFILE, "python3 tini wget", "python3 wget", "starts with tini, which it doesn't install"),
]


@pytest.mark.parametrize(("check", "path", "old", "new", "found"), BROKEN)
def test_what_is_broken_is_found(check: Check, path: str, old: str, new: str, found: str):
    faults = list(check(FILES.changed(path, old, new)))
    assert any(found in fault for fault in faults), faults

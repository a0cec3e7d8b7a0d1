"""Writes what the Prometheus operator takes: .venv/bin/python deploy/kubernetes/make_monitoring.py.

Made of deploy/prometheus, so that a cluster scrapes, records and alerts as Prometheus does elsewhere.
"""

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from typing_extensions import override

FILE = Path(__file__).parent / "service" / "monitoring.yaml"

_PROMETHEUS = Path(__file__).parents[1] / "prometheus"
_SECRET = "kfdist-certs"
_NAME = "app.kubernetes.io/name"
_ABOUT = """\
# For the Prometheus operator: what deploy/prometheus says, made by deploy/kubernetes/make_monitoring.py. Edit it there.
# The job is called as the service's label says. An instance is its pod, whose name outlives the pod's address: to
# Prometheus a controller that starts again is the same one. Certificates are read from the secret beside these objects.
"""


def text() -> str:
    """Returns the file's text: a ServiceMonitor, and a PrometheusRule for each file of rules."""
    config = _load("prometheus.yml")
    (scrape,) = config["scrape_configs"]
    objects = [_monitor(scrape, config["global"]["scrape_interval"])]
    objects += [_rules(name, config["global"]["evaluation_interval"]) for name in config["rule_files"]]
    return _ABOUT + yaml.dump_all(objects, Dumper=_Dumper, sort_keys=False, width=10_000)


def _load(name: str) -> dict[str, Any]:
    return yaml.safe_load((_PROMETHEUS / name).read_text(encoding="utf-8"))


def _monitor(scrape: Mapping[str, Any], interval: str) -> dict[str, Any]:
    tls = scrape["tls_config"]
    endpoint = {
        "port": "metrics",
        "path": "/metrics",
        "scheme": scrape["scheme"],
        "interval": interval,
        "tlsConfig": {
            "serverName": tls["server_name"],
            "ca": {"secret": _key(tls["ca_file"])},
            "cert": {"secret": _key(tls["cert_file"])},
            "keySecret": _key(tls["key_file"]),
        },
        "relabelings": [{"sourceLabels": ["__meta_kubernetes_pod_name"], "targetLabel": "instance"}],
    }
    selector = {"matchLabels": {_NAME: scrape["job_name"], "app.kubernetes.io/component": "controller"}}
    return _object("ServiceMonitor", "kfdist", {"jobLabel": _NAME, "selector": selector, "endpoints": [endpoint]})


def _key(file: str) -> dict[str, str]:
    return {"name": _SECRET, "key": PurePosixPath(file).name}


def _rules(name: str, interval: str) -> dict[str, Any]:
    groups = [{"name": group["name"], "interval": interval, **group} for group in _load(name)["groups"]]
    return _object("PrometheusRule", f"kfdist-{PurePosixPath(name).stem}", {"groups": groups})


def _object(kind: str, name: str, spec: Mapping[str, Any]) -> dict[str, Any]:
    return {"apiVersion": "monitoring.coreos.com/v1", "kind": kind, "metadata": {"name": name}, "spec": spec}


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as such, and repeats what occurs twice instead of naming it."""

    @override
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _represent)


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")

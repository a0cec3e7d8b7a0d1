"""What YAML files say, held to the table of kinds in kinds.yaml."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from tests.deploy.files import ALERTS, COMPOSE, RECORDING, SCRAPE, Files

_SIMPLE: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "quantity": (str, int),
    "any": (object,),
}

_NAMED = {
    COMPOSE: "compose",
    SCRAPE: "prometheus",
    RECORDING: "prometheus rules",
    ALERTS: "prometheus rules",
    "deploy/grafana/provisioning/datasources/prometheus.yaml": "grafana datasources",
    "deploy/grafana/provisioning/dashboards/kfdist.yaml": "grafana dashboards",
}


@cache
def table() -> dict[str, Any]:
    return yaml.safe_load((Path(__file__).parent / "kinds.yaml").read_text(encoding="utf-8"))


def check_kinds(files: Files) -> Iterator[str]:
    """Every YAML file parses, and has the fields that its kind has."""
    for path in files.paths(r".*\.ya?ml"):
        try:
            documents = files.documents(path)
        except yaml.YAMLError as error:
            yield f"{path} isn't YAML: {' '.join(str(error).split())}"
            continue
        for document in documents:
            kind, fields = _NAMED.get(path), dict(document)
            if kind is None:
                kind = f"{fields.pop('apiVersion', None)} {fields.pop('kind', None)}"
            if kind == "compose":
                fields = {name: value for name, value in fields.items() if not name.startswith("x-")}
            if kind not in table()["kinds"]:
                yield f"{path}: no kind {kind!r} in the table"
                continue
            yield from _fields(fields, table()["kinds"][kind], f"{path}: {kind}")
    for name, service in files.documents(COMPOSE)[0]["services"].items():
        yield from _fields(service, table()["types"]["ComposeService"], f"{COMPOSE}: {name}")


def _fields(value: Any, fields: dict[str, str], where: str) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"{where} is {value!r}; it must be a table"
        return
    types = {name.rstrip("!"): kind for name, kind in fields.items()}
    for name in fields:
        if name.endswith("!") and name[:-1] not in value:
            yield f"{where} has no {name[:-1]}"
    for name, inner in value.items():
        if name not in types:
            yield f"{where} has no field {name!r}"
        else:
            yield from _typed(inner, types[name], f"{where}.{name}")


def _typed(value: Any, kind: str, where: str) -> Iterator[str]:
    if kind.endswith("[]"):
        if not isinstance(value, list):
            yield f"{where} is {value!r}; it must be a list"
            return
        for index, item in enumerate(value):
            yield from _typed(item, kind[:-2], f"{where}[{index}]")
    elif kind in _SIMPLE:
        if not isinstance(value, _SIMPLE[kind]) or (isinstance(value, bool) and kind not in ("boolean", "any")):
            yield f"{where} is {value!r}; it must be a {kind}"
    elif kind == "strings":
        if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
            yield f"{where} is {value!r}; it must be a table of strings"
    elif kind in table()["types"]:
        yield from _fields(value, table()["types"][kind], where)
    elif value not in kind.split("|"):
        yield f"{where} is {value!r}; it must be one of {kind}"

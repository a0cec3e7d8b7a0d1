"""The controller as a process: what it imports, and what generic gRPC tools find in it."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator

import grpc
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from kfdist.control.client import RunView
from kfdist.errors import EnvironmentFault
from tests.support.controller import ControllerThread
from tests.support.waits import eventually

SERVICES = {"kfdist.v1.RunService", "kfdist.v1.MembershipService"}

USE_IT = """
import asyncio, json, os, signal, sys, threading, urllib.request
from pathlib import Path
from kfdist.cli.main import app
from kfdist.control import controller

def use(controller):
    from kfdist.control.client import ControlClient
    def work():
        with ControlClient(controller.address) as client:
            client.create("r"); client.pause("r"); client.stop("r"); list(client.events("r"))
        urllib.request.urlopen(f"http://{controller.metrics_address}/metrics").read()
        os.kill(os.getpid(), signal.SIGTERM)
    threading.Thread(target=work).start()

options = controller.ControllerOptions(state=Path(sys.argv[1]), address="127.0.0.1:0", metrics_address="127.0.0.1:0")
asyncio.run(controller.serve(options, on_ready=use))
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def test_a_controller_at_work_has_imported_neither_torch_nor_ray(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", USE_IT, str(tmp_path / "c.sqlite")], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    imported = set(json.loads(done.stdout))
    assert {"kfdist", "grpc", "prometheus_client", "sqlite3"} <= imported
    assert not imported & {"torch", "ray", "numpy", "sklearn", "safetensors"}


def test_importing_rpc_control_and_telemetry_has_no_effect():
    script = (
        "import importlib, logging, os, pkgutil, threading\n"
        "before = (threading.active_count(), logging.getLogger('kfdist').handlers[:], dict(os.environ))\n"
        "for package in ('rpc', 'control', 'telemetry'):\n"
        "    package = importlib.import_module(f'kfdist.{package}')\n"
        "    for module in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
        "        importlib.import_module(module.name)\n"
        "assert before == (threading.active_count(), logging.getLogger('kfdist').handlers, dict(os.environ))\n"
        "assert not logging.getLogger().handlers\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_health_says_serving_and_then_not(tmp_path):
    controller = ControllerThread(tmp_path / "c.sqlite")
    with grpc.insecure_channel(controller.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", *SERVICES):
            answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        watch = stub.Watch(health_pb2.HealthCheckRequest(service="kfdist.v1.RunService"), timeout=30)
        seen = [next(watch).status]
        ending = threading.Thread(target=controller.close)
        ending.start()
        seen.append(next(watch).status)
        ending.join()
        assert seen == [health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING]


def test_reflection_describes_every_method(controller):
    with grpc.insecure_channel(controller.address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        requests = [
            reflection_pb2.ServerReflectionRequest(list_services=""),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol="kfdist.v1.RunService"),
        ]
        listed, file = stub.ServerReflectionInfo(iter(requests), timeout=10)
        assert SERVICES <= {service.name for service in listed.list_services_response.service}
        described = [
            descriptor_pb2.FileDescriptorProto.FromString(each)
            for each in file.file_descriptor_response.file_descriptor_proto
        ]
        methods = {method.name for each in described for service in each.service for method in service.method}
        assert {"Create", "Get", "List", "Watch", "Pause", "Resume", "UpdateSettings", "Checkpoint", "Stop"} <= methods


def test_watches_that_were_dropped_make_room_for_others(client, monkeypatch):
    monkeypatch.setattr("kfdist.control.watchers.MAX_WATCHERS", 1)
    client.create("r")

    def begin() -> Iterator[RunView] | None:
        watch = client.watch("r")
        try:
            next(watch)
        except EnvironmentFault as refusal:
            assert "has 1 watches already" in str(refusal)
            return None
        return watch

    for _ in range(5):
        watch = eventually(begin, lambda watch: watch is not None)
        assert watch is not None
        assert begin() is None
        watch.close()

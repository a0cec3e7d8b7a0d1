"""Which calls gRPC repeats by itself."""

import json

from kfdist.rpc._generated.kfdist.v1 import inversion_pb2, membership_pb2, run_pb2
from kfdist.rpc.channels import service_config


def repeats(service: str, method: str) -> bool:
    """As gRPC reads a service config: an entry that names the method goes before one that names its service."""
    entries = json.loads(service_config())["methodConfig"]
    for name in ({"service": service, "method": method}, {"service": service}):
        for entry in entries:
            if name in entry["name"]:
                return "retryPolicy" in entry
    return False


def test_no_stream_is_repeated_and_every_other_call_to_the_controller_is() -> None:
    for module in (run_pb2, membership_pb2):
        for service in module.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                streams = method.client_streaming or method.server_streaming
                assert repeats(service.full_name, method.name) is not streams, method.full_name


def test_an_inversion_is_not_repeated_and_a_question_for_peers_is() -> None:
    (service,) = inversion_pb2.DESCRIPTOR.services_by_name.values()
    assert [method.name for method in service.methods if repeats(service.full_name, method.name)] == ["ListPeers"]

"""What docs/security.md shows is valid, and its limits are those of the code."""

import re
import tomllib
from pathlib import Path

from kfdist.config import config_from_table, load_config
from kfdist.control import membership_service, metrics_server, validation
from kfdist.owner import inversion_service
from kfdist.rpc import channels, servers
from kfdist.rpc.certificates import make_certificates
from kfdist.types import MAX_OWNERS

PAGE = (Path(__file__).parents[2] / "docs" / "security.md").read_text(encoding="utf-8")


def _block(language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
    return found


def test_the_configuration_is_valid_and_needs_its_certificates():
    shown = tomllib.loads(_block("toml"))
    whole = load_config(None, environment={}).model_dump(exclude_none=True)
    merged = {**whole, **{section: {**whole[section], **table} for section, table in shown.items()}}
    assert config_from_table(merged).security.certificates == "/etc/kfdist/certs"


def test_the_files_are_those_that_are_made(tmp_path: Path):
    make_certificates(tmp_path / "certs")
    assert set(re.findall(r"^\| `([a-z.]+)` \|", PAGE, flags=re.MULTILINE)) == {
        file.name for file in (tmp_path / "certs").iterdir()
    }


def test_the_limits_are_the_codes():
    rows = dict(re.findall(r"^\| ([^|]*) \| ([^|]*) \| `(?:rpc|owner|control)/", PAGE, flags=re.MULTILINE))
    owner = inversion_service.ServiceLimits()
    assert rows == {
        "a message": f"{channels.MAX_MESSAGE_BYTES >> 20} MiB",
        "calls, connections, streams per connection": (
            f"{servers.MAX_CALLS}, {servers.MAX_CONNECTIONS} or what open files (`ulimit -Hn`) leave room for, "
            f"{servers.MAX_STREAMS_PER_CONNECTION}"
        ),
        "a handshake": f"{servers.HANDSHAKE_SECONDS} s",
        "a payload": (
            f"{owner.payload_bytes >> 30} GiB, allocated as it arrives; {owner.idle_seconds:g} s between messages, "
            f"{owner.slowest_bytes_per_second / 1e6:g} MB/s on the whole"
        ),
        "what a payload says is in it": (
            f"{inversion_service.MAX_OUTLINE_BYTES >> 20} MiB of JSON; every tensor's size must fit the bytes that came"
        ),
        "groups, samples, owners, texts": (
            f"{validation.MAX_GROUPS:,}, {validation.MAX_SAMPLES:,} a beat, {MAX_OWNERS}, "
            f"{validation.MAX_TEXT_CHARACTERS} characters"
        ),
        "a heartbeat stream's silence": f"{membership_service.SILENT_SECONDS:g} s",
        "requests for metrics": (
            f"{metrics_server.MAX_REQUESTS} at a time, {metrics_server.SECONDS:g} s of silence, "
            f"{metrics_server.LONGEST_SECONDS:g} s in all"
        ),
    }

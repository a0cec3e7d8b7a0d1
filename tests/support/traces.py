"""Where the host waits for a CUDA device, by torch's profiler, which sees all threads and what the driver is asked for.

`torch.cuda.set_sync_debug_mode` knows of torch's own waits, and not of copies of pageable memory.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from kfdist.linalg.uploads import TAKEN_AT_ONCE

SPAN = "what is looked at"
WAITS = frozenset({"cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaMemcpy"})
EVENT_WAIT, LONG = "cudaEventSynchronize", 200
"""Microseconds; of an event that has happened it takes a few, and that is how numbers are read that have arrived."""


@contextmanager
def profiled(path: Path) -> Iterator[None]:
    """Profiles what is done inside, and writes the trace at its end."""
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=kinds) as found, record_function(SPAN):
        yield
    found.export_chrome_trace(str(path))


def waits_of(path: Path) -> list[str]:
    """Returns what in a trace made the host wait, as words."""
    return waits_in(json.loads(path.read_text())["traceEvents"])


def waits_in(events: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns what in the events of a trace made the host wait, as words; what began within `SPAN` alone."""
    [span] = [each for each in events if each.get("name") == SPAN and each.get("cat") == "user_annotation"]
    ends = span["ts"] + span["dur"]
    called = [each for each in events if each.get("cat") == "cuda_runtime" and span["ts"] <= each["ts"] <= ends]
    found = [each["name"] for each in called if each["name"] in WAITS]
    found += [EVENT_WAIT for each in called if each["name"] == EVENT_WAIT and each["dur"] > LONG]
    mine = {each["args"]["correlation"] for each in called}
    for each in events:
        if each.get("cat") != "gpu_memcpy" or each["args"]["correlation"] not in mine:
            continue
        pageable = "Pageable" in each["name"]
        if pageable and ("-> Pageable" in each["name"] or each["args"]["bytes"] > TAKEN_AT_ONCE):
            found.append(f"{each['name']}, {each['args']['bytes']} bytes")
    return found

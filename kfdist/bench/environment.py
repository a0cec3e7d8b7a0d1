"""The machine that figures were measured on, and how busy it was."""

import os
import platform
from typing import Any

import torch

from kfdist.system.provenance import processor_field


def hardware() -> dict[str, Any]:
    """Returns what the times depend on: the processor, its cores and the threads that torch may use."""
    return {
        "machine": platform.machine(),
        "cpu": processor_field("model name") or platform.processor(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def load_average() -> float:
    """Returns how many processes wanted a core during the last minute, this one among them."""
    return round(os.getloadavg()[0], 2)

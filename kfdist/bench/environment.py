"""The machine that figures were measured on, and how busy it was."""

import os
import platform
from typing import Any

import torch

from kfdist.training.summary import versions as versions


def hardware() -> dict[str, Any]:
    """Returns what the times depend on: the processor, its cores and the threads that torch may use."""
    return {
        "machine": platform.machine(),
        "cpu": _processor(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def load_average() -> float:
    """Returns how many processes wanted a core during the last minute, this one among them."""
    return round(os.getloadavg()[0], 2)


def _processor() -> str:
    """Returns the processor's name as Linux tells it, empty where nothing does."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
            return next(names, platform.processor())
    except OSError:
        return platform.processor()

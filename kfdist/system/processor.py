"""What Linux says about the processor."""

from pathlib import Path


def processor_field(*names: str) -> str:
    """Returns the first field of /proc/cpuinfo that has one of `names`, such as "model name"; empty without any."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    fields = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in fields if name.strip() in names), "")

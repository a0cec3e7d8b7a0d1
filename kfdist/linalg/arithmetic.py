"""What users have switched on around our code does not reach into it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def plain_arithmetic(device: torch.device) -> Iterator[None]:
    """Inside, products have the dtype of their factors, tensors are ordinary ones, and no graph is made.

    Otherwise a step inside `torch.autocast` would invert in half precision, and what is made inside of
    `torch.inference_mode` could not be changed in place outside of it.

    Args:
        device: Where it is computed, beside the CPU.
    """
    if not (torch.is_grad_enabled() or torch.is_inference_mode_enabled() or _is_autocast(device)):
        yield  # as in most hooks: four contexts would take as long as a small product
        return
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        if device.type in ("cpu", "meta"):  # autocast knows no meta
            yield
        else:
            with torch.autocast(device.type, enabled=False):
                yield


def _is_autocast(device: torch.device) -> bool:
    kinds = {"cpu", device.type} - {"meta"}
    return any(torch.is_autocast_enabled(kind) for kind in kinds)


@contextmanager
def fast_products(device: torch.device) -> Iterator[None]:
    """Inside, products of float32 on a CUDA device round their factors to 10 bits (TF32) and sum in float32.

    For sums of many rows, whose rounding averages out; rows that were bfloat16 or float16 have no more bits. On a CPU
    nothing changes: its products of bfloat16 would round the sums.
    """
    before = torch.get_float32_matmul_precision()
    if device.type != "cuda" or before != "highest":
        yield
        return
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)

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
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        if device.type in ("cpu", "meta"):  # autocast knows no meta
            yield
        else:
            with torch.autocast(device.type, enabled=False):
                yield


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

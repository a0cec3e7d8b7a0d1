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
    if not (torch.is_inference_mode_enabled() or _is_autocast(device)):
        # As nearly always: four contexts would take as long as a small product.
        if torch.is_grad_enabled():
            with torch.no_grad():
                yield
        else:
            yield
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


def product_precision(device: torch.device | str) -> str:
    """Returns what products of float32 round their factors to on a device: "ieee" for not at all, "tf32" or "bf16".

    By the setting of that kind of device alone. `torch.get_float32_matmul_precision` speaks for all of them together,
    and raises where one was set by itself, as torch recommends (`torch.backends.cuda.matmul.fp32_precision`).
    """
    backends = torch.backends
    if torch.device(device).type == "cuda":
        said = backends.cuda.matmul.fp32_precision
    else:
        said = backends.mkldnn.matmul.fp32_precision  # pyright: ignore[reportAttributeAccessIssue]
    return "ieee" if said == "none" else str(said)


@contextmanager
def fast_products(device: torch.device) -> Iterator[None]:
    """Inside, products of float32 on a CUDA device round their factors to 10 bits (TF32) and sum in float32.

    For sums of many rows, whose rounding averages out; rows that were bfloat16 or float16 have no more bits. On a CPU
    nothing changes, in other threads neither: its products of bfloat16 would round the sums, and a thread that inverts
    there while this one measures must find the precision that it always finds.
    """
    if device.type != "cuda" or product_precision(device) == "tf32":
        yield
        return
    # Of all settings the one that is CUDA's alone and leaves torch's older and newer ones in agreement.
    matmul = torch.backends.cuda.matmul
    matmul.allow_tf32 = True
    try:
        yield
    finally:
        matmul.allow_tf32 = False

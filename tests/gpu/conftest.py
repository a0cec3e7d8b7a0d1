"""The GPU tier: the same tests on a CPU, where they only show that the tests work, and on a CUDA device.

xdist's process that only hands tests out reads this file, too, and needs no torch.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


def _there(request: pytest.FixtureRequest) -> "torch.device":
    import torch

    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here; `make gpu` runs this where there is one")
    return torch.device(request.param)


@pytest.fixture(params=["cpu", CUDA])
def device(request: pytest.FixtureRequest) -> "torch.device":
    """Where the test computes."""
    return _there(request)


@pytest.fixture(params=[pytest.param("cpu", marks=pytest.mark.slow), CUDA])
def device_of_processes(request: pytest.FixtureRequest) -> "torch.device":
    """Where the processes that the test starts compute; on a CPU in the slow tier, as they load torch."""
    return _there(request)


@pytest.fixture
def without_waiting(device: "torch.device") -> Callable[[], AbstractContextManager[None]]:
    """Refuses, inside the `with`, everything that makes the host wait for the device."""

    @contextmanager
    def refusing() -> Iterator[None]:
        import torch

        if device.type != "cuda":
            yield
            return
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return refusing


@pytest.fixture
def keep_busy(device: "torch.device") -> Callable[[], Callable[[], bool]]:
    """Gives the device a second of work; returns what says whether it is still at it."""

    def begin() -> Callable[[], bool]:
        import torch

        if device.type != "cuda":
            return lambda: False
        torch.cuda._sleep(2_000_000_000)  # clock cycles, of less than 2 GHz
        done = torch.cuda.Event()
        done.record()
        return lambda: not done.query()

    return begin

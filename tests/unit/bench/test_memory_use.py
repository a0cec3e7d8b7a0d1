"""`kfdist bench memory`: what may be taken, and what is read of processes."""

import os

import pytest
import torch

from kfdist.bench.memory_use import MemorySettings, allowed_bytes, distinct_bytes, growth, resident
from kfdist.errors import ConfigError


def test_statistics_two_snapshots_and_a_tenth_of_all_are_allowed():
    parts = {"parameters": 100, "optimizer": 200, "statistics": 1000, "snapshots_twice": 700}
    assert allowed_bytes(parts) == 1700 + 200


def test_a_storage_counts_once_and_whole():
    base = torch.zeros(10)
    assert distinct_bytes([base, base[2:4], base.view(2, 5), torch.zeros(3, dtype=torch.int64)]) == 40 + 24


def test_growth_is_that_of_the_second_half():
    assert growth([100, 200, 300, 400], [0, 900, 1000, 1010]) == pytest.approx(100.0)


def test_the_kernel_is_asked():
    peak = resident(os.getpid(), "VmHWM")
    assert 10_000_000 < peak <= resident("self", "VmHWM") < peak + 10_000_000  # to ask takes some, too
    assert resident("self", "VmNothing") == 0 and resident(2**22 + 1, "VmHWM") == 0


@pytest.mark.parametrize("given", [{"model": "x"}, {"steps": 0}, {"long_steps": 3}])
def test_wrong_settings_are_refused(given: dict):
    with pytest.raises(ConfigError, match=f"--{next(iter(given)).replace('_', '-')}"):
        MemorySettings(**given)

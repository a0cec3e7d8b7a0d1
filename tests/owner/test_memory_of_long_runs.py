"""Two thousand steps with an owner leave the rank and its courier as large as a few hundred did."""

import pytest

from kfdist.bench.memory_use import MemorySettings, train_long
from kfdist.bench.own_process import in_own_process
from kfdist.bench.served import served


@pytest.mark.slow
def test_neither_a_rank_nor_its_courier_grows():
    with served() as running:
        found = in_own_process(train_long, MemorySettings(long_steps=2000), running.service)
    assert found["steps"][-1] == 2000 and found["inversions"] > 100
    # Of each inversion, job and result have 80 kB: had they stayed, there would be tens of MB.
    assert found["rank_bytes_a_1000_steps"] < 1_000_000
    assert found["courier_bytes_a_1000_steps"] < 1_000_000
    assert found["objects_a_1000_steps"] < 500

"""Numbers reach the host whole, in order, and without a wait for the device."""

import pytest
import torch

from kfdist.comm.host_copy import HostCopy, LateTotal

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


def test_on_the_cpu_tensors_are_there_already():
    tensors = [torch.arange(3), torch.ones(())]
    copy = HostCopy(tensors, aside=True)
    assert copy.ready()
    assert all(there is given for there, given in zip(copy.wait(), tensors, strict=True))


def test_nothing_to_copy():
    assert HostCopy([]).ready() and HostCopy([]).wait() == []


def test_a_total_on_the_cpu_is_never_late():
    total = LateTotal()
    assert total.latest([]) == 0.0
    assert total.latest([torch.tensor(2), torch.tensor(3.5)]) == 5.5
    assert total.latest(torch.tensor(each) for each in (1, 2, 3)) == 6.0
    assert total.latest([]) == 6.0, "with nothing to count, what was known last"


@CUDA
@pytest.mark.gpu
@pytest.mark.parametrize("aside", [False, True])
def test_on_a_device_the_copy_is_that_of_the_moment_and_doesnt_wait(aside: bool):
    source, resident = torch.zeros(1 << 20, device="cuda"), torch.ones(2)
    torch.cuda._sleep(200_000_000)
    source += 1
    copy = HostCopy([source, resident], aside=aside)
    if not aside:
        source += 1
    assert not copy.ready(), "the device is still busy, and making the copy didn't wait for it"
    arrived, same = copy.wait()
    assert copy.ready() and arrived.device.type == "cpu" and same is resident
    assert bool((arrived == 1).all())
    torch.cuda.synchronize()


@CUDA
@pytest.mark.gpu
def test_a_total_of_the_device_comes_one_question_late():
    total, count = LateTotal(), torch.tensor(3, device="cuda")
    torch.cuda._sleep(100_000_000)
    assert total.latest([count]) == 0.0
    torch.cuda.synchronize()
    assert total.latest([count + 1]) == 3.0

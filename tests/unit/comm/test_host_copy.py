"""Numbers reach the host whole and in order; from a device, see tests/gpu."""

import torch

from kfdist.comm.host_copy import HostCopy, LateTotal


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

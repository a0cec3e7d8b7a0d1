"""No hook, folding or application reads a value back to the host, which would stall a CUDA stream."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from kfdist.capture.requests import CHAIN_SUMS, COARSE_SUMS, PLAIN_SUMS, Sampling
from kfdist.comm.communicator import Communicator
from kfdist.curvature.averages import WeightedSums, sum_shapes
from kfdist.curvature.inverse import BlockMemory, KroneckerInverse
from kfdist.curvature.statistics import Needs
from kfdist.runtime.apply.directions import Application, precondition_gradients
from kfdist.runtime.apply.rates import finite_gradients
from tests.support.factors import armed_capture, blocks_of

READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "unique_consecutive", "_unique2"}
"""Operators whose result on the host, or whose shape, depends on values."""


class NoReads(TorchDispatchMode):
    """Refuses every operator that reads values, in forward and backward."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name.startswith("index") and any(
            isinstance(each, torch.Tensor) and each.dtype == torch.bool
            for each in (args[1] if len(args) > 1 and isinstance(args[1], list) else [])
        )
        if name in READS or by_mask:
            raise AssertionError(f"{func} reads values back to the host")
        return func(*args, **(kwargs or {}))


def model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, 3))


@pytest.mark.parametrize(
    "read",
    [float, bool, torch.Tensor.item, torch.nonzero, lambda t: t[t > 0], lambda t: torch.equal(t, t), torch.unique],
)
def test_reads_are_noticed(read: Callable[[torch.Tensor], Any]):
    with NoReads(), pytest.raises(AssertionError, match="reads values"):
        read(torch.ones(1))


def test_reads_in_a_backward_are_noticed():
    x = torch.ones(1, requires_grad=True)
    y = 2 * x
    y.register_hook(lambda gradient: gradient if gradient > 0 else None)
    with NoReads(), pytest.raises(AssertionError, match="reads values"):
        y.backward()


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(examples_fraction=0.5, positions_fraction=0.5)], ids=str)
@pytest.mark.parametrize("reentrant", [None, True, False], ids=["plain", "reentrant", "non-reentrant"])
@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
def test_capturing_and_folding(sampling: Sampling, reentrant: bool | None, scaled: bool):
    net, scaler = model(), torch.amp.GradScaler("cpu", enabled=scaled)
    capture = armed_capture(net, sampling=sampling, grad_scaler=scaler)
    with NoReads():
        for _ in range(2):
            x, y = torch.randn(6, 2, 6, 6, requires_grad=True), torch.zeros(6, dtype=torch.int64)
            output = net(x) if reentrant is None else checkpoint(net, x, use_reentrant=reentrant)
            assert isinstance(output, torch.Tensor)
            scaler.scale(nn.functional.cross_entropy(output, y) / 2).backward()
        finite = finite_gradients(net.parameters())
        drained = capture.drain()
        assert set(drained) == {"0", "3"}
        for name, batch in drained.items():
            shape = blocks_of(net)[name].shape
            sums = WeightedSums(sum_shapes(shape, Needs()), dtype=torch.float32, device="cpu")
            sums.fold(batch, 0.5, finite)
            assert [tuple(each.shape[1:]) for each in list(sums.packed().values())[:2]] == [
                (d * (d + 1) // 2,) for d in (shape.d_in, shape.d_out)
            ]


@pytest.mark.parametrize("loss", ["cross_entropy", "mse", "binary_cross_entropy"])
@pytest.mark.parametrize("fisher", ["mc", "exact"])
def test_observing(fisher: str, loss: str):
    net = model()
    capture = armed_capture(net, fisher=fisher, sampling=Sampling(examples_fraction=0.5))
    with NoReads():
        target = torch.tensor([0, 1, 2, -100, 0, 1]) if loss == "cross_entropy" else torch.zeros(6, 3)
        output = net(torch.randn(6, 2, 6, 6))
        capture.observe(output, loss, target=target)
        output.sum().backward()
        assert set(capture.drain()) == {"0", "3"}


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
def test_rows_samples_and_cross_sums(fisher: str):
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    capture = armed_capture(
        net,
        fisher=fisher,
        chains=[["0", "2"]],
        coarse=[["0", "2"]],
        sums=PLAIN_SUMS | CHAIN_SUMS | COARSE_SUMS,
        rows=frozenset({"A", "G"}),
        samples=5,
    )
    with NoReads():
        for _ in range(3):  # the reservoir drops examples it kept
            output = net(torch.randn(4, 4))
            capture.observe(output, "cross_entropy")
            (output.sum() / 3).backward()
        drained = capture.drain()
    assert all(each.samples is not None and len(each.samples.weight) == 5 for each in drained.values())


@pytest.mark.parametrize("fallback", [False, True])
@pytest.mark.parametrize("kl_clip", [None, 1e-3])
def test_applying(kl_clip: float | None, fallback: bool):
    net = model()
    with NoReads():
        nn.functional.cross_entropy(net(torch.randn(4, 2, 6, 6)), torch.zeros(4, dtype=torch.int64)).backward()
        applications = []
        for block in blocks_of(net).values():
            c, p, q = block.shape.groups, block.shape.d_out, block.shape.d_in
            inverse = KroneckerInverse(
                trace_A=torch.ones(c),
                trace_G=torch.ones(c),
                A_inverse=torch.ones(c, q, q),
                G_inverse=torch.ones(c, p, p),
                damping_A=torch.ones(c),
                damping_G=torch.ones(c),
            )
            applications.append(
                Application(
                    blocks=[block],
                    preconditioners=[inverse],
                    memories=[BlockMemory()],
                    damping=0.1,
                    fallback=fallback,
                )
            )
        precondition_gradients(
            applications, kl_clip=kl_clip, learning_rate=lambda parameter: 0.1, communicator=Communicator(None)
        )

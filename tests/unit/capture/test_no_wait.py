"""No hook, folding or application reads a value back to the host, which would stall a CUDA stream."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from kfdist.capture import masks
from kfdist.capture.capture import Capture
from kfdist.capture.requests import CHAIN_SUMS, COARSE_SUMS, PLAIN_SUMS, Request, Sampling
from kfdist.comm.communicator import Communicator
from kfdist.curvature.averages import WeightedSums, sum_shapes
from kfdist.curvature.block_memory import BlockMemory
from kfdist.curvature.blocks.base import Block, ParameterPart
from kfdist.curvature.blocks.experts import ExpertsBlock
from kfdist.curvature.inverse import KroneckerInverse
from kfdist.curvature.inverters.kfac_diagonal import DiagonalInverse
from kfdist.curvature.statistics import Needs
from kfdist.linalg import sparse_rows
from kfdist.linalg.sparse_rows import dense_of, sparse_of
from kfdist.runtime.apply.directions import Application, precondition_gradients
from kfdist.runtime.apply.rates import finite_gradients
from kfdist.runtime.reduce.noise_scale import NoiseScale
from tests.support.factors import armed_capture, blocks_of

READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "unique_consecutive", "_unique2", "bincount",
         "_coalesce", "_to_sparse"}  # fmt: skip
"""Operators whose result on the host, or whose shape, depends on values; `bincount` looks for the largest one."""


class _NoCopies(TorchFunctionMode):
    """Refuses what reads a whole tensor, and is no operator."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.cpu):
            raise AssertionError(f"{func} reads values back to the host")
        return func(*args, **(kwargs or {}))


class NoReads(TorchDispatchMode):
    """Refuses everything that reads values, in forward and backward."""

    def __enter__(self) -> "NoReads":
        self._copies = _NoCopies()
        self._copies.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._copies.__exit__(*error)

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


TWICE = torch.sparse_coo_tensor(torch.zeros(1, 2, dtype=torch.int64), torch.ones(2), (1,), check_invariants=True)


@pytest.mark.parametrize(
    "read",
    [
        float,
        bool,
        torch.Tensor.item,
        torch.Tensor.tolist,
        torch.Tensor.cpu,
        torch.nonzero,
        lambda t: t[t > 0],
        lambda t: torch.equal(t, t),
        torch.unique,
        lambda t: t.long().bincount(minlength=3),
        lambda t: t.to_sparse(),
        lambda t: TWICE.coalesce(),
    ],
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


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
@pytest.mark.parametrize("fisher", ["empirical", "mc"])
def test_masks(monkeypatch: pytest.MonkeyPatch, fisher: str, dtype: torch.dtype):
    monkeypatch.setattr(masks, "_on_host", lambda tensor: False)
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    capture = armed_capture(net, fisher=fisher, samples=3)
    mask = (torch.arange(5) < torch.tensor([[5], [2], [1]])).to(dtype)
    with NoReads():
        capture.state_mask(mask)
        output = net(torch.randn(3, 5, 4))
        capture.observe(output.mT, "cross_entropy")
        output.sum().backward()
        drained = capture.drain()
        assert {name: of for name, (_, of) in capture.masked.counts.items()} == {"0": 15, "2": 15}
    assert set(drained) == {"0", "2"}


@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
def test_norms_of_gradients(scaled: bool):
    net, scaler = model(), torch.amp.GradScaler("cpu", enabled=scaled)
    parameters = list(net.parameters())
    capture = Capture(net, {}, sampling=Sampling(), grad_scaler=scaler)
    noise = NoiseScale(parameters, Communicator(None), torch.device("cpu"))
    capture.arm({}, norms=True)
    with NoReads():
        for _ in range(2):
            scaler.scale(net(torch.randn(6, 2, 6, 6)).square().mean() / 2).backward()
        noise.measure(capture.norms.found())
    assert float(noise.state_dict()["gradient_noise"][0]) == 1.0


def reduced_late(gradient: torch.Tensor, net: nn.Module) -> None:
    """Changes gradients when the backward has ended, as DistributedDataParallel does."""

    def reduce() -> None:
        for parameter in net.parameters():
            assert parameter.grad is not None
            parameter.grad.mul_(1.0)

    torch.autograd.Variable._execution_engine.queue_callback(reduce)  # type: ignore[attr-defined]


@pytest.mark.parametrize("reduced", [False, True])
def test_micro_batches_kept_and_dropped(reduced: bool):
    """Gradients that are absent or as the last backward left them say by themselves whether it counts."""
    net = model()
    capture = armed_capture(net)
    if reduced:
        next(iter(net.parameters())).register_hook(lambda gradient: reduced_late(gradient, net))
    with NoReads():
        for dropped in (True, False, False):
            net(torch.randn(6, 2, 6, 6)).square().sum().backward()
            if dropped:
                net.zero_grad()
        assert all(each.examples == 12 for each in capture.drain().values())


ROUTES, ENDS = torch.tensor([0, 3, 3, 0, 0, 3]), torch.tensor([3, 3, 3, 6], dtype=torch.int32)
"""Which of four experts each row meets, and where their rows end once they are sorted; nothing reaches 1 and 2."""

MIXTURES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "one by one": lambda x, w: torch.cat([nn.functional.linear(x[:4], w[0]), nn.functional.linear(x[4:], w[3])]),
    "sorted": lambda x, w: nn.functional.grouped_mm(x, w.transpose(-2, -1), offs=ENDS),
    "picked": lambda x, w: torch.bmm(w[ROUTES], x.unsqueeze(-1)).squeeze(-1),
    "all": lambda x, w: torch.bmm(x.expand(4, -1, -1), w.mT).sum(0),
}


class Mixture(nn.Module):
    def __init__(self, use: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.experts, self.use = nn.Parameter(torch.randn(4, 8, 16)), use

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.use(x, self.experts).tanh()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("use", MIXTURES.values(), ids=MIXTURES.keys())
def test_experts(use: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], masked: bool):
    net = Mixture(use)
    block = ExpertsBlock("experts", net, ParameterPart("experts", net.experts), layer="")
    capture = Capture(net, {"experts": block}, sampling=Sampling(), grad_scaler=None)
    capture.arm({"experts": Request()})
    with NoReads():
        for _ in range(2):
            if masked:
                capture.state_mask(torch.ones(6, 1, dtype=torch.bool))
            net(torch.randn(6, 16)).square().sum().backward()
        drained = capture.drain()["experts"]
        sums = WeightedSums(sum_shapes(block.shape, Needs()), dtype=torch.float32, device="cpu", routed=True)
        sums.fold(drained, 0.5)
    assert isinstance(drained.positions, torch.Tensor)
    assert drained.positions.tolist() == {"one by one": [8, 0, 0, 4], "all": [12] * 4}.get(
        next(name for name, each in MIXTURES.items() if each is use), [6, 0, 0, 6]
    )


TABLES = {
    "embedding": lambda: nn.Embedding(5, 4, padding_idx=0),
    "bags": lambda: nn.EmbeddingBag(5, 4, padding_idx=0),
    "sparse embedding": lambda: nn.Embedding(5, 4, sparse=True),  # torch itself reads where padding is
    "sparse bags": lambda: nn.EmbeddingBag(5, 4, sparse=True),
}


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES.keys())
def test_tables(monkeypatch: pytest.MonkeyPatch, table: Callable[[], nn.Module]):
    """Also where a sparse gradient is averaged over ranks, read as a matrix and written back."""
    monkeypatch.setattr(sparse_rows, "_on_host", lambda tensor: False)
    net = nn.Sequential(table(), nn.Tanh())
    block, wanted = blocks_of(net)["0"], Needs(sums=frozenset({"A_diagonal", "G"}))
    capture = armed_capture(net, sums=wanted.sums, sampling=Sampling(examples_fraction=0.5, positions_fraction=0.5))
    with NoReads():
        for _ in range(2):
            net(torch.tensor([[0, 1, 1], [4, 2, 2]])).square().sum().backward()
        sums = WeightedSums(sum_shapes(block.shape, wanted), dtype=torch.float32, device="cpu")
        sums.fold(capture.drain()["0"], 0.5)
        parameter = block.parts[0].parameter
        assert parameter.grad is not None
        if parameter.grad.is_sparse:
            parameter.grad = sparse_of(dense_of(parameter.grad))
        precondition([application(block, DiagonalInverse, fallback=False)], 1e-3)


def application(block: Block, kind: type[KroneckerInverse | DiagonalInverse], *, fallback: bool) -> Application:
    """Of an inverse of ones."""
    c, p, q = block.shape.groups, block.shape.d_out, block.shape.d_in
    inverse = kind(
        trace_A=torch.ones(c),
        trace_G=torch.ones(c),
        A_inverse=torch.ones((c, q) if kind is DiagonalInverse else (c, q, q)),
        G_inverse=torch.ones(c, p, p),
        damping_A=torch.ones(c),
        damping_G=torch.ones(c),
    )
    return Application(
        blocks=[block], preconditioners=[inverse], memories=[BlockMemory()], damping=0.1, fallback=fallback
    )


def precondition(applications: list[Application], kl_clip: float | None) -> None:
    precondition_gradients(
        applications, kl_clip=kl_clip, learning_rate=lambda parameter: 0.1, communicator=Communicator(None)
    )


def bags_with_offsets(net: nn.Module) -> None:
    net(torch.tensor([0, 1, 1, 4]), torch.tensor([0, 3])).sum().backward()


def gradients_clipped_between_two_backwards(net: nn.Module) -> None:
    for _ in range(2):
        net(torch.tensor([[0], [1]])).sum().backward()
        for parameter in net.parameters():
            assert parameter.grad is not None
            parameter.grad.mul_(0.5)


@pytest.mark.parametrize("waits", [bags_with_offsets, gradients_clipped_between_two_backwards])
def test_what_waits_and_is_documented(waits: Callable[[nn.Module], None]):
    """How long bags are (decision 18); whether gradients that were all changed are zero (`MicroBatches.dropped`)."""
    net = nn.EmbeddingBag(5, 4, sparse=True)
    capture = armed_capture(net, sums=frozenset({"A_diagonal", "G"}))
    with NoReads(), pytest.raises(AssertionError, match="reads values"):
        waits(net)
    capture.close()


@pytest.mark.parametrize("fallback", [False, True])
@pytest.mark.parametrize("kl_clip", [None, 1e-3])
def test_applying(kl_clip: float | None, fallback: bool):
    net = model()
    with NoReads():
        nn.functional.cross_entropy(net(torch.randn(4, 2, 6, 6)), torch.zeros(4, dtype=torch.int64)).backward()
        blocks = blocks_of(net).values()
        precondition([application(block, KroneckerInverse, fallback=fallback) for block in blocks], kl_clip)

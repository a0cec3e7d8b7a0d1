"""Norms, scales and tables on ranks equal one process on the union of their batches; gradients dense and sparse."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfdist
from kfdist.comm.communicator import Communicator
from kfdist.comm.reduce import GradientReducer
from tests.support.ranks import run_ranks

STEPS, RANKS, N, T, V, D = 3, 2, 4, 3, 9, 5
EXACT = 1e-10
"""float64; sums over ranks in another order."""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.norm, self.head = nn.Embedding(V, D, padding_idx=0), nn.LayerNorm(D), nn.Linear(D, 3)
        self.bags = nn.EmbeddingBag(V, D, mode="mean", sparse=True)
        self.gamma = nn.Parameter(torch.full((D,), 0.5))
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head((self.norm(self.table(tokens)) * self.gamma).tanh().mean(1) + self.bags(tokens))


def batches(step: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(step)
    return [
        (torch.randint(0, V, (N, T), generator=generator), torch.randint(0, 3, (N,), generator=generator))
        for _ in range(RANKS)
    ]


def train(communicator: Communicator) -> dict[str, Tensor]:
    model = Net()
    reducer = GradientReducer(list(model.parameters()), communicator)
    preconditioner = kfdist.Preconditioner(
        model, "kfac", damping=0.1, factor_period=1, inverse_period=2, lr=0.1, adoption=kfdist.FixedLag(0)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        shares = batches(step)
        alone = communicator.world_size == 1
        x, y = (torch.cat(each) for each in zip(*shares, strict=True)) if alone else shares[communicator.rank]
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        reducer.reduce()
        preconditioner.step()
        assert model.bags.weight.grad is not None and model.bags.weight.grad.is_sparse
        optimizer.step()
    columns = {track.group.name for track in preconditioner.pipeline.tracks if not track.group.own}
    assert columns == {"head", "table", "bags"}
    preconditioner.close()
    reducer.close()
    return {name: each.detach() for name, each in model.named_parameters()}


def test_ranks_equal_one_process_on_the_union():
    torch.set_num_threads(1)
    serial = train(Communicator(None))
    for of_rank in run_ranks(RANKS, train):
        for name, expected in serial.items():
            torch.testing.assert_close(of_rank[name], expected, rtol=0, atol=EXACT)

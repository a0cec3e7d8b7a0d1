"""Cross factors of chains and coarse sums, against each example's rows written out."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kfdist.capture.requests import CHAIN_SUMS, COARSE_SUMS, Request, Sampling
from kfdist.curvature.averages import BatchStatistics
from kfdist.errors import ConfigError, KfdistError
from tests.support.factors import Factors, armed_capture, blocks_of, rows_by_definition
from tests.support.small_models import images, small_cnn

EXACT = 1e-12
"""float64 sums over at most 300 rows."""

CHAIN = ["0", "2", "4"]
COARSE = ["0", "2", "5", "7"]
FACTORS = frozenset({"A", "G"})


def chain() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4, bias=False), nn.Tanh(), nn.Linear(4, 3)]
    return nn.Sequential(*layers).double()


def chain_batch(n: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 3, generator=generator).double(), torch.randint(0, 3, (n,), generator=generator)


def truth(model: nn.Module, x: Tensor, y: Tensor) -> list[Factors]:
    def loss(model: nn.Module, example: Any) -> Tensor:
        return F.cross_entropy(model(example[0][None]), example[1][None])

    return rows_by_definition(model, list(zip(x, y, strict=True)), loss, list(blocks_of(model)))


def measure(
    model: nn.Module, batch: tuple[Tensor, Tensor], *, k: int = 1, **arguments: Any
) -> dict[str, BatchStatistics]:
    capture = armed_capture(model, **arguments)
    for xs, ys in zip(batch[0].chunk(k), batch[1].chunk(k), strict=True):
        (F.cross_entropy(model(xs), ys) / k).backward()
    return capture.drain()


@pytest.mark.parametrize("k", [1, 3])
def test_cross_factors_of_a_chain(k: int):
    batch = chain_batch()
    drained = measure(chain(), batch, k=k, chains=[CHAIN], sums=FACTORS | CHAIN_SUMS)
    rows = truth(chain(), *batch)
    for i, j in pairwise(CHAIN):
        for side, part in enumerate(("A_next", "G_next")):
            expected = sum(of_example[i][side].mT @ of_example[j][side] for of_example in rows)
            torch.testing.assert_close(drained[i].sums[part], expected, rtol=EXACT, atol=EXACT)
    assert drained["4"].sums["A_next"].shape == (1, 5, 0)
    assert drained["4"].sums["G_next"].shape == (1, 3, 0)


def test_the_joint_second_moment_of_a_sampled_chain_is_positive():
    """Neighbours are sampled alike, or their cross factor would not belong to their own factors."""
    sampling = Sampling(examples_fraction=0.3)
    for seed in range(5):
        capture = armed_capture(model := chain(), sampling=sampling, chains=[CHAIN])
        sums = FACTORS | CHAIN_SUMS
        capture.arm({name: Request(sums=sums, seed=10 * seed + i) for i, name in enumerate(CHAIN)})
        x, y = chain_batch(12)
        for xs, ys in zip(x.chunk(2), y.chunk(2), strict=True):
            (F.cross_entropy(model(xs), ys) / 2).backward()
        drained = capture.drain()
        first, second = drained["0"].sums, drained["2"].sums
        for own, cross in (("A", "A_next"), ("G", "G_next")):
            top = torch.cat([first[own][0], first[cross][0]], dim=1)
            bottom = torch.cat([first[cross][0].T, second[own][0]], dim=1)
            assert torch.linalg.eigvalsh(torch.cat([top, bottom])).min() > -1e-12


@pytest.mark.parametrize("fisher", ["mc", "exact"])
def test_cross_factors_of_the_model_s_own_predictions(fisher: str):
    """For one example the cross factors are the off-diagonal blocks of J^T H J, enumerated by hand."""
    model, (x, _) = chain(), chain_batch(1)
    capture = armed_capture(model, fisher=fisher, chains=[CHAIN], sums=FACTORS | CHAIN_SUMS)
    output = model(x)
    capture.observe(output, "mse")
    drained = capture.drain()
    if fisher == "mc":  # one draw: all Gammas are of rank one, and the cross factor ties them together
        G, G_next, other = (drained["0"].sums["G"], drained["0"].sums["G_next"], drained["2"].sums["G"])
        torch.testing.assert_close(G_next @ G_next.mT, G * other[0].trace(), rtol=1e-10, atol=1e-12)
        return
    outputs = []
    hidden = x
    for layer in model.children():
        hidden = layer(hidden)
        outputs.append(hidden)
    gradients = [[torch.autograd.grad(z, outputs[i], retain_graph=True)[0] for z in hidden.flatten()] for i in (0, 2)]
    expected = sum(a.T @ b for a, b in zip(*gradients, strict=True)) * (2 / 3)
    torch.testing.assert_close(drained["0"].sums["G_next"][0], expected, rtol=EXACT, atol=EXACT)


def nearest(alpha: Tensor, few: int) -> Tensor:
    """[c, T] to [c, few], the position at the same relative place."""
    return alpha[:, [t * alpha.shape[1] // few for t in range(few)]]


def coarse_entry(rows: list[Factors], i: str, j: str, side: int) -> tuple[Tensor, int]:
    """The sum over all pairs of positions that meet, and how many these are."""
    total, pairs = torch.zeros((), dtype=torch.float64), 0
    for of_example in rows:
        alpha, beta = (of_example[name][side].sum(-1) for name in (i, j))
        few = min(alpha.shape[1], beta.shape[1])
        alpha, beta = nearest(alpha, few), nearest(beta, few)
        if len(alpha) != len(beta):  # groups of a convolution against one: by their mean direction
            product = alpha.sum(0) * beta.sum(0) / (len(alpha) * len(beta)) ** 0.5
        else:
            product = (alpha * beta).sum(0)
        total += product.sum()
        pairs += few
    return total, pairs


@pytest.mark.parametrize("k", [1, 2])
def test_coarse_sums(k: int):
    batch = images(6)
    drained = measure(small_cnn(), batch, k=k, coarse=[COARSE], sums=FACTORS | COARSE_SUMS)
    rows = truth(small_cnn(), *batch)
    for index, i in enumerate(COARSE):
        for side, (part, own) in enumerate((("a_cross", "A"), ("g_cross", "G"))):
            entries = [coarse_entry(rows, i, j, side) for j in COARSE]
            expected = torch.stack([total for total, _ in entries])
            torch.testing.assert_close(drained[i].sums[part], expected, rtol=EXACT, atol=EXACT)
            found = drained[i].pairs
            assert found is not None and found.tolist() == [pairs for _, pairs in entries]
            torch.testing.assert_close(drained[i].sums[part][index], drained[i].sums[own].sum(), rtol=1e-9, atol=1e-9)


def test_coarse_sums_are_the_sums_of_all_entries_of_cross_factors():
    """Where positions agree: R F R^T of the joint factors, exactly (algorithms.md 7.1)."""
    batch = chain_batch()
    drained = measure(chain(), batch, coarse=[CHAIN], chains=[CHAIN], sums=FACTORS | COARSE_SUMS | CHAIN_SUMS)
    for index in (0, 1):
        of = drained[CHAIN[index]].sums
        torch.testing.assert_close(of["a_cross"][index + 1], of["A_next"].sum(), rtol=EXACT, atol=EXACT)
        torch.testing.assert_close(of["g_cross"][index + 1], of["G_next"].sum(), rtol=EXACT, atol=EXACT)
        other = drained[CHAIN[index + 1]].sums
        torch.testing.assert_close(other["a_cross"][index], of["a_cross"][index + 1], rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("fisher", ["mc", "exact"])
def test_coarse_sums_of_the_model_s_own_predictions(fisher: str):
    model, (x, _) = small_cnn(), images(4)
    capture = armed_capture(model, fisher=fisher, coarse=[COARSE], sums=FACTORS | COARSE_SUMS)
    capture.observe(model(x), "cross_entropy")
    drained = capture.drain()
    for index, name in enumerate(COARSE):
        of = drained[name].sums
        torch.testing.assert_close(of["a_cross"][index], of["A"].sum(), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(of["g_cross"][index], of["G"].sum(), rtol=1e-9, atol=1e-9)
    matrix = torch.stack([drained[name].sums["g_cross"] for name in COARSE])
    torch.testing.assert_close(matrix, matrix.T)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared, self.head = nn.Linear(3, 3), nn.Linear(3, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.shared(torch.tanh(self.shared(x)))))


def test_a_layer_called_twice_has_two_positions():
    batch = chain_batch()
    names = ["shared", "head"]
    drained = measure(Twice(), batch, coarse=[names], sums=FACTORS | COARSE_SUMS)
    of = drained["shared"].sums
    torch.testing.assert_close(of["a_cross"][0], of["A"].sum(), rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(of["g_cross"][0], of["G"].sum(), rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(of["a_cross"][1], drained["head"].sums["a_cross"][0], rtol=EXACT, atol=EXACT)
    with pytest.raises(KfdistError, match="'shared' has several positions"):
        measure(Twice(), batch, chains=[names], sums=FACTORS | CHAIN_SUMS)


def test_a_sequence_is_refused_in_the_forward_and_nothing_is_left_of_it():
    model = chain()
    capture = armed_capture(model, chains=[CHAIN], sums=FACTORS | CHAIN_SUMS)
    with pytest.raises(KfdistError, match="'0' has several positions per example"):
        model(torch.randn(2, 4, 3).double())
    model(torch.randn(2, 1, 3).double()).sum().backward()
    assert set(capture.drain()) == set(CHAIN)


@pytest.mark.parametrize(
    ("names", "said"), [(["2", "5"], "'2' has several positions"), (["0", "2"], "positions|groups")]
)
def test_chains_are_for_layers_of_one_position(names: list[str], said: str):
    with pytest.raises(KfdistError, match=said):
        measure(small_cnn(), images(3), names=names, chains=[names], sums=CHAIN_SUMS)


def test_a_neighbour_that_was_not_called_leaves_zeros():
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3).double(), nn.Linear(3, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x)

    drained = measure(Optional(), chain_batch(), chains=[["first", "second"]], sums=CHAIN_SUMS)
    assert set(drained) == {"first"}
    assert torch.equal(drained["first"].sums["A_next"], torch.zeros(1, 4, 4, dtype=torch.float64))


@pytest.mark.parametrize("sums", [CHAIN_SUMS, COARSE_SUMS])
def test_groups_are_armed_together(sums: frozenset[str]):
    capture = armed_capture(chain(), chains=[["0", "2"]], coarse=[["0", "2"]])
    with pytest.raises(ConfigError, match="arm all of it together"):
        capture.arm({"0": Request(sums=sums)})
    with pytest.raises(ConfigError, match="is in no"):
        capture.arm({"4": Request(sums=sums)})

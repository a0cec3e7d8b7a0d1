"""Mean vectors, all rows of a batch, and rows of drawn examples, against each example's rows written out."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kfdist.capture import reservoir
from kfdist.capture.capture import Capture
from kfdist.capture.requests import Request, Sampling
from kfdist.curvature.averages import BatchStatistics, ExampleRows
from kfdist.curvature.blocks import Block
from kfdist.curvature.references import empirical_fisher, per_example_gradients
from kfdist.errors import ConfigError, KfdistError
from tests.support.block_cases import make_block
from tests.support.factors import Factors, armed_capture, blocks_of, rows_by_definition
from tests.support.small_models import images, small_cnn

EXACT = 1e-12
"""float64 sums over at most 300 rows."""

LAYERS = ["0", "2", "5", "7"]

ALL_ROWS = frozenset({"A", "G"})


class Shared(nn.Module):
    """One layer at two places."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.shared, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.shared(torch.tanh(self.shared(x)))))


class Sequences(nn.Module):
    """Flattens examples and positions before its first layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second = nn.Linear(3, 4, bias=False), nn.Linear(4, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x.flatten(0, 1))).unflatten(0, x.shape[:2])
        return self.second(hidden).mean(1)


MODELS = {"cnn": small_cnn, "shared": Shared, "sequences": Sequences}


def batch(model: str, n: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    if model == "cnn":
        return images(n, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    shape = (n, 4) if model == "shared" else (n, 5, 3)
    return torch.randn(shape, generator=generator).double(), torch.randint(0, 3, (n,), generator=generator)


def truth(name: str, n: int = 6) -> list[Factors]:
    x, y = batch(name, n)
    model = MODELS[name]()

    def loss(model: nn.Module, example: Any) -> Tensor:
        return F.cross_entropy(model(example[0][None]), example[1][None])

    return rows_by_definition(model, list(zip(x, y, strict=True)), loss, list(blocks_of(model)))


def measure(name: str, *, n: int = 6, k: int = 1, scaler: Any = None, **arguments: Any) -> dict[str, BatchStatistics]:
    model = MODELS[name]()
    capture = armed_capture(model, grad_scaler=scaler, **arguments)
    x, y = batch(name, n)
    for xs, ys in zip(x.chunk(k), y.chunk(k), strict=True):
        loss = F.cross_entropy(model(xs), ys) / k
        (loss if scaler is None else scaler.scale(loss)).backward()
    return capture.drain()


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_mean_vectors(name: str, k: int):
    drained = measure(name, k=k, sums=frozenset({"a", "g"}))
    for layer, each in drained.items():
        assert set(each.sums) == {"a", "g"}
        a, g = (torch.cat([of_example[layer][side] for of_example in truth(name)], dim=1) for side in (0, 1))
        assert (each.examples, each.positions) == (6, a.shape[1])
        torch.testing.assert_close(each.sums["a"], a.sum(1), rtol=EXACT, atol=EXACT)
        torch.testing.assert_close(each.sums["g"], g.sum(1), rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("part", ["A", "G", "a", "g"])
def test_only_what_is_asked_is_measured(part: str):
    for each in measure("cnn", sums=frozenset({part})).values():
        assert set(each.sums) == {part}
        assert each.rows == {} and each.samples is None


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("scale", [None, 1024.0])
@pytest.mark.parametrize("name", MODELS)
def test_products_of_the_rows_are_the_sums(name: str, scale: float | None, k: int):
    scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
    for layer, each in measure(name, k=k, scaler=scaler, rows=ALL_ROWS).items():
        assert set(each.rows) == ALL_ROWS
        for part, rows in each.rows.items():
            torch.testing.assert_close(rows.mT @ rows, each.sums[part], rtol=EXACT, atol=EXACT)
        a = torch.cat([of_example[layer][0] for of_example in truth(name)], dim=1)
        assert each.rows["A"].shape == a.shape
        torch.testing.assert_close(each.rows["A"].mT @ each.rows["A"], a.mT @ a, rtol=EXACT, atol=EXACT)


def test_rows_of_one_side_only():
    for each in measure("cnn", rows=frozenset({"G"}), sums=frozenset({"A"})).values():
        assert set(each.rows) == {"G"} and set(each.sums) == {"A"}


def test_rows_are_of_the_examples_that_are_measured():
    sampling = Sampling(examples_fraction=0.5)
    for each in measure("cnn", rows=ALL_ROWS, sampling=sampling, seed=5).values():
        for part, rows in each.rows.items():
            torch.testing.assert_close(rows.mT @ rows, each.sums[part], rtol=EXACT, atol=EXACT)


def test_sub_sampled_positions_leave_rows_and_samples_whole():
    sampling = Sampling(positions_fraction=0.25, positions_budget=3)
    few = measure("cnn", rows=ALL_ROWS, samples=4, sampling=sampling)
    whole = measure("cnn", rows=ALL_ROWS, samples=4)
    for layer, each in few.items():
        assert torch.equal(each.rows["A"], whole[layer].rows["A"])
        assert torch.equal(each.rows["G"], whole[layer].rows["G"])
        assert samples_of(each).a.shape == samples_of(whole[layer]).a.shape


def samples_of(each: BatchStatistics) -> ExampleRows:
    assert each.samples is not None
    return each.samples


def gradients(rows: ExampleRows) -> Tensor:
    """`[n, c, p, q]`."""
    return torch.einsum("cntp,cntq->ncpq", rows.g, rows.a)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("scale", [None, 1024.0])
@pytest.mark.parametrize("name", MODELS)
def test_samples_of_all_examples_are_their_gradients(name: str, scale: float | None, k: int):
    scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
    model = MODELS[name]()
    x, y = batch(name)
    losses = F.cross_entropy(model(x), y, reduction="none")
    for layer, each in measure(name, k=k, scaler=scaler, samples=6).items():
        expected = per_example_gradients(blocks_of(model)[layer], losses)
        found = samples_of(each)
        torch.testing.assert_close(gradients(found), expected, rtol=EXACT, atol=EXACT)
        assert found.weight.tolist() == [1.0] * 6
        fisher = empirical_fisher(expected)
        torch.testing.assert_close(empirical_fisher(gradients(found)), fisher, rtol=EXACT, atol=EXACT)


def drawn_examples(name: str, layer: str, found: ExampleRows) -> list[int]:
    model = MODELS[name]()
    x, y = batch(name)
    expected = per_example_gradients(blocks_of(model)[layer], F.cross_entropy(model(x), y, reduction="none"))
    distances = (gradients(found)[:, None] - expected[None]).abs().amax(dim=(2, 3, 4))
    assert float(distances.amin(1).max()) < 1e-10, "a sample is no example's gradient"
    return distances.argmin(1).tolist()


@pytest.mark.parametrize("k", [1, 2, 6])
@pytest.mark.parametrize("name", MODELS)
def test_samples_are_some_examples_and_stand_for_all(name: str, k: int):
    for layer, each in measure(name, k=k, samples=4, seed=1).items():
        found = samples_of(each)
        chosen = drawn_examples(name, layer, found)
        assert len(set(chosen)) == 4
        assert float(found.weight.sum()) == 6.0


def test_every_example_is_drawn_equally_often():
    """200 draws of 2 of 6: each comes about 67 times, with a standard deviation of 6.7; 5 of them are allowed."""
    counts: Counter[int] = Counter()
    model = Shared()
    x, y = batch("shared")
    expected = per_example_gradients(blocks_of(model)["head"], F.cross_entropy(model(x), y, reduction="none"))
    capture = armed_capture(model, names=["head"])
    for seed in range(200):
        capture.arm({"head": Request(samples=2, seed=seed, sums=frozenset())})
        for part in (slice(0, 1), slice(1, 4), slice(4, 6)):
            (F.cross_entropy(model(x[part]), y[part], reduction="sum") / (part.stop - part.start) / 3).backward()
        found = samples_of(capture.drain()["head"])
        distances = (gradients(found)[:, None] - expected[None]).abs().amax(dim=(2, 3, 4))
        counts.update(distances.argmin(1).tolist())
    assert sum(counts.values()) == 400
    assert all(abs(counts[example] - 400 / 6) < 5 * 6.7 for example in range(6)), counts


def test_the_same_seed_draws_the_same():
    first, again, other = (measure("cnn", samples=2, seed=seed) for seed in (3, 3, 4))
    assert all(torch.equal(samples_of(first[each]).g, samples_of(again[each]).g) for each in LAYERS)
    assert any(not torch.equal(samples_of(first[each]).g, samples_of(other[each]).g) for each in LAYERS)


def test_micro_batches_of_different_length_are_filled_with_zeros():
    model = Sequences()
    capture = armed_capture(model, samples=8)
    parts = [batch("sequences", 2), batch("sequences", 2, seed=1)]
    parts[1] = (parts[1][0][:, :3], parts[1][1])
    twin = Sequences()
    losses = [F.cross_entropy(twin(x), y, reduction="none") for x, y in parts]
    expected = per_example_gradients(blocks_of(twin)["second"], torch.cat(losses))
    for x, y in parts:
        (F.cross_entropy(model(x), y) / 2).backward()
    found = samples_of(capture.drain()["second"])
    assert found.a.shape[2] == 5
    torch.testing.assert_close(gradients(found), expected, rtol=EXACT, atol=EXACT)


def test_nothing_of_the_batch_is_kept_alive():
    """Kept rows are copies, no views of whole activations."""
    model = nn.Sequential(nn.Linear(3, 3, bias=False)).float()
    capture = armed_capture(model, rows=ALL_ROWS, samples=2)
    x = torch.randn(64, 3)
    F.cross_entropy(model(x), torch.zeros(64, dtype=torch.int64)).backward()
    each = capture.drain()["0"]
    before = each.rows["A"].clone()
    x.zero_()
    assert torch.equal(each.rows["A"], before)
    assert samples_of(each).a.untyped_storage().nbytes() == 2 * 3 * 4


def test_two_layers_of_different_batches_in_one_forward_have_no_samples():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).sum() + self.layer(x[:2]).sum()

    model = Odd()
    capture = armed_capture(model, samples=2)
    with pytest.raises(KfdistError, match="no example has rows of its own"):
        model(torch.randn(3, 3)).backward()
    capture.close()


@pytest.mark.parametrize("name", ["cnn", "shared"])
def test_sampled_labels_have_rows_and_samples(name: str):
    """The rows' products are the sums; samples of all examples give the gradients of the drawn targets."""
    model = MODELS[name]()
    capture = armed_capture(model, fisher="mc", rows=ALL_ROWS, samples=6)
    x, y = batch(name)
    for xs, ys in zip(x.chunk(2), y.chunk(2), strict=True):
        output = model(xs)
        capture.observe(output, "cross_entropy")
        (F.cross_entropy(output, ys) / 2).backward()
    for each in capture.drain().values():
        for part, rows in each.rows.items():
            torch.testing.assert_close(rows.mT @ rows, each.sums[part], rtol=EXACT, atol=EXACT)
        found = samples_of(each)
        assert float(found.weight.sum()) == 6.0
        G = torch.einsum("cntp,cntr->cpr", found.g, found.g)
        torch.testing.assert_close(G, each.sums["G"], rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"sums": frozenset({"B"})}, "allowed are"),
        ({"rows": frozenset({"a"})}, "allowed are"),
        ({"samples": 0}, "samples: 0 .* at least 1"),
        ({"samples": 1, "sample_rows": 0}, "sample_rows: 0 .* at least 1"),
        ({"samples": 1, "sample_columns": 0}, "sample_columns: 0 .* at least 1"),
    ],
)
def test_other_requests_are_refused(asked: dict[str, Any], said: str):
    with pytest.raises(ConfigError, match=said):
        Request(**asked)


@pytest.mark.parametrize("bad", [0, -1, 1.5, True, "3"])
def test_other_limits_of_positions_are_refused(bad: Any):
    with pytest.raises(ConfigError, match="positions_budget: .* is not allowed"):
        Sampling(positions_budget=bad)


@pytest.mark.parametrize("k", [1, 3])
def test_rows_are_bounded_while_they_are_drawn(k: int):
    """The budget of rows holds in the capture, where rows of all positions would be a hundred times the input."""
    for layer, each in measure("cnn", k=k, samples=6, sample_rows=60).items():
        found = samples_of(each)
        positions = found.a.shape[2]
        assert found.a.shape[1] == min(6, max(1, 60 // positions))
        assert set(found.positions.tolist()) == {positions} and found.frame == positions
        assert float(found.weight.sum()) == 6.0
        assert set(drawn_examples("cnn", layer, found)) <= set(range(6))


@pytest.mark.parametrize("tile_bytes", [1, 1 << 25])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_columns_are_compressed_while_they_are_drawn(
    monkeypatch: pytest.MonkeyPatch, name: str, k: int, tile_bytes: int
):
    """5 columns hold every gradient here: none has a larger rank."""
    monkeypatch.setattr(reservoir, "TILE_BYTES", tile_bytes)
    model = MODELS[name]()
    x, y = batch(name)
    losses = F.cross_entropy(model(x), y, reduction="none")
    whole = measure(name, k=k, samples=6)
    for layer, each in measure(name, k=k, samples=6, sample_columns=5).items():
        found, block = samples_of(each), blocks_of(model)[layer]
        calls = 2 if layer == "shared" else 1
        positions = samples_of(whole[layer]).a.shape[2]
        assert min(block.shape.d_in, block.shape.d_out, positions) <= 5
        assert found.a.shape[2] <= 5 * calls
        assert set(found.positions.tolist()) == {positions} and found.frame == positions
        torch.testing.assert_close(gradients(found), per_example_gradients(block, losses), rtol=1e-10, atol=1e-10)


def test_compressed_columns_of_two_heads_add_up():
    """Each head's gradient has columns of its own, which can't be added entry by entry."""
    model = Sequences()
    x, _ = batch("sequences")
    found = {}
    for columns in (None, 3):
        capture = armed_capture(model, fisher="mc", samples=6, sample_columns=columns)
        output = model(x)
        capture.observe(output[:, :2], "mse")
        capture.observe(output[:, 2:], "mse")
        output.square().mean().backward()
        found[columns] = capture.drain()
    for layer in ("first", "second"):
        whole, compressed = (gradients(samples_of(found[columns][layer])) for columns in (None, 3))
        assert samples_of(found[3][layer]).a.shape[2] == 3 < samples_of(found[3][layer]).frame
        torch.testing.assert_close(compressed, whole, rtol=1e-10, atol=1e-10)


def test_sharing_by_reduce_has_the_rows_of_its_factors_and_whole_samples():
    """Its factors see one row per example, but an example's gradient needs all positions."""
    model = Sequences()
    block = make_block("second", model.second, sharing="reduce")
    assert isinstance(block, Block)
    capture = Capture(model, {"second": block}, sampling=Sampling(), grad_scaler=None)
    capture.arm({"second": Request(rows=ALL_ROWS, samples=6)})
    x, y = batch("sequences")
    twin = Sequences()
    expected = per_example_gradients(blocks_of(twin)["second"], F.cross_entropy(twin(x), y, reduction="none"))
    F.cross_entropy(model(x), y).backward()
    each = capture.drain()["second"]
    for part, rows in each.rows.items():
        assert rows.shape[1] == 6
        torch.testing.assert_close(rows.mT @ rows, each.sums[part], rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(gradients(samples_of(each)), expected, rtol=EXACT, atol=EXACT)

"""What every kind of block promises of its sums and rows, and how much memory they take."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from kfdist.curvature.blocks import rows
from kfdist.curvature.blocks.layer_block import SUMS
from kfdist.curvature.blocks.rows import draw_positions
from tests.support.block_cases import CASES, assert_true_to_its_layer, block_of, call, make_case, multiplied
from tests.support.tiers import in_turn

TOLERANCE = 1e-11
"""Float64 sums of at most a few thousand products of numbers of size one."""

EMPTY = {"A": (0, 0), "G": (0, 0), "a": (0,), "g": (0,)}

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")

over_kinds = pytest.mark.parametrize("name", CASES)


class Largest(TorchDispatchMode):
    """Records the largest storage that any operation made, in bytes; views of what was there before don't count."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self._known:
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


@contextmanager
def tile_bytes(monkeypatch: pytest.MonkeyPatch, size: int) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(rows, "TILE_BYTES", size)
        yield


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=10 * TOLERANCE)


@over_kinds
def test_every_kind_is_true_to_its_layer(name: str) -> None:
    layer, inputs = make_case(name)
    assert_true_to_its_layer(layer, inputs, tolerance=TOLERANCE)


@over_kinds
def test_only_what_is_wanted_is_computed(name: str) -> None:
    layer, inputs = make_case(name)
    block, (_, _, gradient) = block_of(layer), call(layer, inputs)
    inputs = multiplied(layer, inputs)
    everything = block.factor_sums(inputs, gradient)
    c = block.shape.groups
    for size in range(4):
        for wanted in map(frozenset, combinations(sorted(SUMS), size)):
            some = block.factor_sums(inputs, gradient, wanted=wanted)
            assert some.rows == everything.rows
            for each in SUMS:
                found = getattr(some, each)
                if each in wanted:
                    close(found, getattr(everything, each))
                else:
                    assert found.shape == (c, *EMPTY[each]) and found.dtype == torch.float64


def test_an_unknown_sum_is_refused() -> None:
    layer, inputs = make_case("linear")
    with pytest.raises(ValueError, match=r"wanted is \['B', 'G'\], must be some of \['A', 'G', 'a', 'g'\]"):
        block_of(layer).factor_sums(inputs, torch.zeros(3, 3), wanted=frozenset({"G", "B"}))


def test_sums_of_rows_lay_nothing_out() -> None:
    """For Eva: without padding, and with all positions, nothing as large as the patches, or as A, is made."""
    layer = nn.Conv2d(8, 8, 5)
    block, inputs = block_of(layer), torch.randn(4, 8, 20, 20)
    gradient = torch.randn(4, 8, 16, 16)
    with Largest(inputs, gradient) as largest:
        block.factor_sums(inputs, gradient, wanted=frozenset({"a", "g"}))
    assert largest.bytes <= 4 * block.shape.d_in


@over_kinds
def test_chosen_examples(name: str) -> None:
    layer, inputs = make_case(name)
    block, (_, _, gradient) = block_of(layer), call(layer, inputs)
    inputs = multiplied(layer, inputs)
    a, g = block.example_rows(inputs, gradient)
    assert a.shape[:2] == g.shape[:2] == (block.shape.groups, 3) and a.shape[2] == g.shape[2]
    if block.has_bias:
        assert torch.equal(a[..., -1], torch.ones_like(a[..., -1]))
    chosen = torch.tensor([2, 0])
    some_a, some_g = block.example_rows(inputs, gradient, chosen)
    assert torch.equal(some_a, a[:, chosen]) and torch.equal(some_g, g[:, chosen])
    none_a, none_g = block.example_rows(inputs, gradient, chosen[:0])
    assert none_a.shape == (a.shape[0], 0, *a.shape[2:]) and none_g.shape == (g.shape[0], 0, *g.shape[2:])


@over_kinds
def test_no_examples_are_legal(name: str) -> None:
    layer, inputs = make_case(name)
    block, (output, _, _) = block_of(layer), call(layer, inputs)
    inputs = multiplied(layer, inputs)
    sums = block.factor_sums(inputs[:0], output[:0].detach())
    assert sums.rows == 0
    assert all(float(getattr(sums, each).abs().sum()) == 0 for each in SUMS)


@over_kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_and_sums_are_float32_at_least(name: str, dtype: torch.dtype) -> None:
    layer, inputs = make_case(name)
    layer, inputs = layer.to(dtype), inputs.to(dtype)
    block, (_, _, gradient) = block_of(layer), call(layer, inputs)
    inputs = multiplied(layer, inputs)
    gradient = gradient.to(dtype)
    assert {rows.dtype for rows in block.example_rows(inputs, gradient)} == {torch.float32}
    sums = block.factor_sums(inputs, gradient)
    exact = block.factor_sums(inputs.double(), gradient.double())
    for each in SUMS:
        assert getattr(sums, each).dtype == torch.float32
        # The rows are the same numbers; only their products are rounded, a few hundred of them.
        torch.testing.assert_close(getattr(sums, each).double(), getattr(exact, each), rtol=1e-5, atol=1e-4)


@over_kinds
def test_positions_by_budget_average_to_the_whole(name: str) -> None:
    """Unbiased for every kind and every sum: each single position is drawn equally often, so their mean is exact."""
    layer, inputs = make_case(name)
    block, (_, _, gradient) = block_of(layer), call(layer, inputs)
    inputs = multiplied(layer, inputs)
    whole, T = block.factor_sums(inputs, gradient), block.positions(*block.batched(inputs, gradient))
    seeds: dict[int, int] = {}
    for seed in range(40 * T):
        drawn = draw_positions(T, 1.0, seed, 1)
        seeds.setdefault(0 if drawn is None else int(drawn), seed)
    assert len(seeds) == T
    parts = [block.factor_sums(inputs, gradient, most_positions=1, seed=seed) for seed in seeds.values()]
    for each in SUMS:
        close(torch.stack([getattr(part, each) for part in parts]).mean(0), getattr(whole, each))


@pytest.mark.parametrize(("name", "rows_a_tile", "fraction"), in_turn(CASES, [1, 3, 17], [1.0, 0.6], of=2))
def test_tiles_change_nothing(name: str, rows_a_tile: int, fraction: float, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, inputs = make_case(name)
    block, (_, _, gradient) = block_of(layer), call(layer, inputs)
    inputs = multiplied(layer, inputs)
    whole = block.factor_sums(inputs, gradient, positions_fraction=fraction, seed=1)
    shape = block.shape
    with tile_bytes(monkeypatch, rows_a_tile * 8 * shape.groups * (shape.d_in + shape.d_out)):
        tiled = block.factor_sums(inputs, gradient, positions_fraction=fraction, seed=1)
    for each in SUMS:
        close(getattr(tiled, each), getattr(whole, each))
    assert tiled.rows == whole.rows


LARGE = {
    "conv1d": (nn.Conv1d(4, 4, 15, padding=7), (4, 3000)),
    "conv2d": (nn.Conv2d(4, 4, 7), (4, 40, 40)),
    "conv2d-groups": (nn.Conv2d(4, 4, 7, padding=3, stride=2, groups=4), (4, 70, 70)),
    "conv3d": (nn.Conv3d(2, 2, 5, padding=2, dilation=2), (2, 14, 14, 14)),
    "conv-transpose2d": (nn.ConvTranspose2d(4, 4, 8, stride=3), (4, 12, 12)),
    "linear": (nn.Linear(64, 64), (3000, 64)),
}


@pytest.mark.parametrize(
    ("name", "fraction", "dtype"), in_turn(LARGE, [1.0, 0.5], [torch.float32, torch.bfloat16], of=2)
)
def test_memory_is_bounded_by_the_tile(
    name: str, fraction: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing larger than a tile is made, though the rows of one example alone are larger, most of them many times."""
    layer, shape = LARGE[name]
    layer, inputs = layer.to(dtype), torch.randn(2, *shape, dtype=dtype)
    block, (output, _, gradient) = block_of(layer), call(layer, inputs)
    inputs = multiplied(layer, inputs)
    gradient = gradient.to(dtype)
    T, c = block.positions(*block.batched(inputs, gradient)), block.shape.groups
    tile = 300_000  # more than a padded image or A takes, and far less than one example's rows
    assert T * fraction * c * (block.shape.d_in + block.shape.d_out) * 4 > 1.2 * tile
    with tile_bytes(monkeypatch, tile), Largest(inputs, gradient, output) as largest:
        block.factor_sums(inputs, gradient, positions_fraction=fraction)
    assert tile / 3 < largest.bytes <= tile


@pytest.mark.parametrize(
    ("positions", "wanted"), [(None, SUMS), (4, SUMS), (600, frozenset({"a", "g"}))], ids=["all", "few", "sums-of-rows"]
)
def test_padded_inputs_and_copied_rows_count_too(
    positions: int | None, wanted: frozenset[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch isn't padded as a whole for the sake of few positions, nor are its drawn rows copied at once."""
    layer = nn.Conv2d(4, 4, 3, padding=1, stride=2)
    block, inputs, gradient = block_of(layer), torch.randn(12, 4, 60, 60), torch.randn(12, 4, 30, 30)
    tile = 200_000
    with tile_bytes(monkeypatch, tile), Largest(inputs, gradient) as largest:
        block.factor_sums(inputs, gradient, most_positions=positions, wanted=wanted)
    assert 12 * block.padded_elements(gradient) * 4 > 3 * tile
    assert tile / 4 < largest.bytes <= tile


@pytest.mark.parametrize(("name", "tile"), in_turn(CASES, [4000, rows.TILE_BYTES], of=2))
def test_nothing_waits_for_a_value(name: str, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake tensor has no values to read (see test_no_host_sync): in tiles, by budget, and for single examples."""
    layer, inputs = make_case(name)
    block, (output, _, _) = block_of(layer), call(layer, inputs)
    inputs = multiplied(layer, inputs)
    with tile_bytes(monkeypatch, tile), FakeTensorMode():
        fakes = torch.zeros(inputs.shape), torch.zeros(output.shape)
        for wanted in (SUMS, frozenset({"a", "g"})):
            assert block.factor_sums(*fakes, wanted=wanted).a.shape == (block.shape.groups, block.shape.d_in)
            assert block.factor_sums(*fakes, most_positions=3, wanted=wanted).rows > 0
        a, g = block.example_rows(*fakes, torch.zeros(2, dtype=torch.int64))
        assert a.shape[1] == g.shape[1] == 2


def test_the_largest_allocation_is_seen() -> None:
    """The bound's own control: with a tile for everything the patches are made at once, and are seen."""
    layer, shape = LARGE["conv2d"]
    layer, inputs = layer.to(torch.float32), torch.randn(2, *shape)
    block, (_, _, gradient) = block_of(layer), call(layer, inputs)
    inputs = multiplied(layer, inputs)
    with Largest(inputs, gradient) as largest:
        block.factor_sums(inputs, gradient.float())
    assert largest.bytes >= 2 * 34 * 34 * 4 * 49 * 4

"""Examples along dim 1 inside of a model, or of its input: the truth is a twin that has them along dim 0 throughout."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kfdist.capture.capture import Capture
from kfdist.capture.requests import Request, Sampling
from kfdist.curvature.averages import BatchStatistics
from kfdist.curvature.blocks import LayerBlock, UnitBlock
from kfdist.errors import KfdistWarning
from tests.support.plans import planned
from tests.support.preconditioning import preconditioner

N, D, WORDS = 4, 6, 5


class Model(nn.Module):
    """Words to classes of all of them, by recurrent layers or by attention.

    Args:
        kind: "recurrent", "attention", or "plain" for layers that don't say how their inputs lie.
        batch_first: Whether examples come first inside.
        time_first: Whether they come second in the input.
    """

    def __init__(self, kind: str, *, batch_first: bool, time_first: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inside_first, self.time_first = batch_first, time_first
        self.table, self.norm, self.scale = nn.Embedding(WORDS, D), nn.LayerNorm(D), nn.Parameter(torch.ones(D))
        layer: Any = nn.TransformerEncoderLayer(D, 2, 8, dropout=0.0, batch_first=batch_first)
        self.inner: Any = {
            "recurrent": lambda: nn.LSTM(D, D, batch_first=batch_first),
            "attention": lambda: nn.TransformerEncoder(layer, 1, nn.LayerNorm(D), enable_nested_tensor=False),
            "plain": lambda: nn.Sequential(nn.Linear(D, D), nn.LayerNorm(D), nn.Tanh()),
        }[kind]()
        self.head = nn.Linear(D, 3)
        self.double()

    def forward(self, words: Tensor) -> Tensor:
        h = self.norm(self.table(words)) * self.scale
        if self.inside_first is self.time_first:
            h = h.transpose(0, 1)
        h = self.inner(h)
        h = h[0] if isinstance(h, tuple) else h
        if self.inside_first is self.time_first and not self.time_first:
            h = h.transpose(0, 1)
        return self.head(h.flatten(0, 1)).view(*h.shape[:2], 3)


def measured(model: Model, words: Tensor, sharing: str) -> dict[str, BatchStatistics]:
    """Everything that can be measured of `words` `[N, T]`."""
    plan = planned(model, "kfac", weight_sharing=sharing)
    blocks = {block.name: block for block in plan.blocks}
    capture = Capture(model, blocks, sampling=Sampling(), grad_scaler=None)
    wanted = {group.blocks[0].name: group.needs[group.blocks[0].name].sums for group in plan.groups}
    capture.arm(
        {
            name: Request(sums=wanted[name])
            if isinstance(block, UnitBlock) or "A" not in wanted[name]
            else Request(sums=wanted[name], samples=N)
            for name, block in blocks.items()
        }
    )
    output = model(words.T if model.time_first else words)
    output = output.transpose(0, 1) if len(output) != N or model.time_first else output
    (output * torch.arange(1, 4)).square().mean(1).sum(1).square().mean().backward()
    drained = capture.drain()
    assert not capture.unmeasured and {name for name, each in blocks.items() if isinstance(each, LayerBlock)} <= set(
        drained
    )
    capture.close()
    return drained


def assert_same(
    found: dict[str, BatchStatistics],
    expected: dict[str, BatchStatistics],
    *,
    but: Sequence[str] = (),
    samples_but: Sequence[str] = (),
) -> None:
    """Compares all statistics of all blocks `but` some."""
    assert found.keys() == expected.keys()
    for name in expected.keys() - set(but):
        mine, truth = found[name], expected[name]
        assert (mine.examples, mine.positions) == (truth.examples, truth.positions), name
        for part, total in truth.sums.items():
            torch.testing.assert_close(mine.sums[part], total, msg=lambda text, name=name: f"{name}: {text}")
        if truth.samples is not None and name not in samples_but:
            assert mine.samples is not None
            for a, b in zip((mine.samples.a, mine.samples.g), (truth.samples.a, truth.samples.g), strict=True):
                torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


CASES = [
    (kind, time_first, length, sharing)
    for kind in ("recurrent", "attention", "plain")
    for time_first in (False, True)
    for length in (2, N, 2 * N, 2 * N + 1)
    for sharing in ("expand", "reduce")
    # Nothing says that dim 1 has the examples; outside of the modules that say so, dim 0 has them where it is as long
    # as there are examples, or a multiple.
    if not (kind == "plain" and (time_first or length <= 2 * N))
    and not (time_first and length == N and sharing == "reduce")
]


class Windows(Model):
    """Folds windows of as many words as there are examples, or frames of as many patches, into dim 0."""

    def forward(self, words: Tensor) -> Tensor:
        h = self.inner(self.norm(self.table(words).reshape(-1, N, D)) * self.scale)
        return self.head(h).reshape(*words.shape, 3)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_windows_as_long_as_there_are_examples_are_not_taken_for_time_steps(sharing: str):
    words = torch.randint(0, WORDS, (N, 3 * N), generator=torch.Generator().manual_seed(1))
    twin = Model("plain", batch_first=True, time_first=False)
    model = Windows("plain", batch_first=True, time_first=False)
    assert_same(measured(model, words, sharing), measured(twin, words, sharing))


@pytest.mark.parametrize(("kind", "time_first", "length", "sharing"), CASES)
def test_statistics_are_those_of_examples_first(kind: str, time_first: bool, length: int, sharing: str):
    square = time_first and length == N
    words = torch.randint(0, WORDS, (N, length), generator=torch.Generator().manual_seed(1))
    twin = Model(kind, batch_first=True, time_first=False)
    model = Model(kind, batch_first=False, time_first=time_first)
    expected, found = measured(twin, words, sharing), measured(model, words, sharing)
    # Outside of the modules that say so, a square input and what is made of it have examples along dim 0.
    assert_same(found, expected, but=("norm", "scale") if square else (), samples_but=("head",) if square else ())


def test_an_output_that_goes_against_it_is_said():
    """A recurrent layer without `batch_first` that is given examples first by mistake."""

    class Mistaken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.LSTM(D, D), nn.Linear(D, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(x)[0].mean(1))

    model = Mistaken()
    with preconditioner(model, "kfac") as pre:
        model(torch.randn(N, 7, D)).square().mean().backward()
        with pytest.warns(KfdistWarning, match="takes dim 1 of the model's first input, 7, for the examples, of which"):
            pre.step()


@pytest.mark.parametrize("last", [False, True])
def test_a_time_first_model_is_not_warned_of(last: bool):
    model = Model("recurrent", batch_first=False, time_first=True)
    with preconditioner(model, "kfac") as pre:
        output = model(torch.randint(0, WORDS, (7, N)))
        (output[-1] if last else output.flatten(0, 1)).square().mean().backward()
        pre.step()
        assert pre.coverage().share == 1


@pytest.mark.parametrize("length", [N, 2 * N])
def test_rows_of_time_steps_are_not_taken_for_those_of_examples(length: int):
    class Places(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.places = nn.Embedding(WORDS, D), nn.Embedding(length, D)
            self.attention = nn.MultiheadAttention(D, 2)

        def forward(self, words: Tensor) -> Tensor:
            h = self.words(words.T) + self.places(torch.arange(length))[:, None]
            return self.attention(h, h, h)[0].transpose(0, 1)

    model = Places()
    with preconditioner(model, "kfac") as pre:
        model(torch.randint(0, WORDS, (N, length))).square().mean().backward()
        with pytest.warns(
            KfdistWarning, match="1 of the blocks .*: 'places': .* a lookup whose dim 0 isn't the examples"
        ):
            pre.step()

"""Padding leaves A, G and their numbers where a mask tells of it and no gradient comes to it."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kfdist.capture.capture import Capture
from kfdist.capture.masks import aligned
from kfdist.capture.requests import Request, Sampling
from kfdist.comm.host_copy import HostCopy
from kfdist.curvature.blocks import make_blocks
from kfdist.curvature.blocks.linear import LinearBlock
from kfdist.curvature.references import per_example_gradients
from kfdist.errors import ConfigError, KfdistWarning
from kfdist.runtime import masking, padding
from tests.support.factors import armed_capture, blocks_of, factors_of
from tests.support.preconditioning import preconditioner

EXACT = 1e-12
"""float64 sums over a few dozen rows."""

N, T, Q, C = 4, 4, 3, 5
"""N and T are equal: a mask that is turned by mistake must not pass."""

LENGTHS = [4, 2, 1, 3]
MASK = torch.arange(T) < torch.tensor(LENGTHS).unsqueeze(1)


class Tokens(nn.Module):
    """A layer whose inputs come as `layout` says, and as `[N, T, q]` outside of it."""

    def __init__(self, layout: str = "[N, T]") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layout, self.layer = layout, nn.Linear(Q, C).double()

    def forward(self, x: Tensor) -> Tensor:
        if self.layout == "[N T]":
            return self.layer(x.flatten(0, 1)).view(*x.shape[:2], C)
        return self.layer(x)


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, T, Q, generator=generator, dtype=torch.float64)
    x[~MASK] = 1e3
    y = torch.randint(0, C, (N, T), generator=generator)
    y[~MASK] = -100
    return x, y


def token_loss(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), y.flatten())


def expected(model: Tokens) -> tuple[Tensor, Tensor]:
    """Omega and Gamma of the tokens that count alone, with N their number: the Fisher block of the empirical kind."""
    x, y = batch()
    tokens = x[MASK]
    logits = model.layer(tokens)
    (g,) = torch.autograd.grad(F.cross_entropy(logits, y[MASK], reduction="sum"), logits)
    a = torch.cat([tokens, torch.ones(len(tokens), 1, dtype=torch.float64)], 1)
    return a.T @ a / len(a), g.T @ g / len(g)


def close(found: Tensor, truth: Tensor) -> None:
    torch.testing.assert_close(found, truth, rtol=EXACT, atol=EXACT * float(truth.abs().max()))


@pytest.mark.parametrize("layout", ["[N, T]", "[N T]"])
@pytest.mark.parametrize("mask", [MASK, MASK.long(), MASK.double()], ids=["bool", "int64", "float64"])
def test_masked_tokens_are_as_if_they_were_not_there(layout: str, mask: Tensor) -> None:
    model, (x, y) = Tokens(layout), batch()
    capture = armed_capture(model)
    capture.state_mask(mask)
    capture.state_examples(int(MASK.sum()))
    token_loss(model(x), y).backward()
    drained = capture.drain()["layer"]
    assert float(drained.positions) == drained.examples == sum(LENGTHS)
    for found, truth in zip(factors_of({"layer": drained})["layer"], expected(model), strict=True):
        close(found[0], truth)


@pytest.mark.parametrize("fisher", ["mc", "exact"])
@pytest.mark.parametrize("flat", [False, True])
def test_ignored_targets_are_a_mask(fisher: str, flat: bool) -> None:
    """ignore_index's default is Hugging Face's -100, too."""
    model, (x, y) = Tokens(), batch()
    capture = armed_capture(model, fisher=fisher)
    capture.state_examples(int(MASK.sum()))
    logits = model(x)
    if flat:
        capture.observe(logits.flatten(0, 1), "cross_entropy", target=y.flatten())
    else:
        capture.observe(logits.mT, "cross_entropy", target=y)
    token_loss(logits, y).backward()
    drained = capture.drain()["layer"]
    assert float(drained.positions) == sum(LENGTHS)
    A, G = factors_of({"layer": drained})["layer"]
    close(A[0], expected(model)[0])
    if fisher == "exact":
        p = torch.softmax(logits.detach()[MASK], -1)
        close(G[0], (torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)).mean(0))


class Attending(nn.Module):
    """Tokens that the loss ignores reach it through the mean of their sequence; padding doesn't."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(Q, 3).double(), nn.Linear(3, C).double()

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(x)) * MASK.unsqueeze(-1)
        return self.head(hidden + hidden.sum(1, keepdim=True))


@pytest.mark.parametrize("fisher", ["empirical", "mc", "exact"])
def test_rows_with_a_gradient_stay(fisher: str) -> None:
    """A prompt is masked in the loss, and trained through attention: it counts in the body and not in the head."""
    x, y = batch()
    y[:, 0] = -100  # of the third sequence nothing is left
    model = Attending()
    capture = armed_capture(model, fisher=fisher)
    logits = model(x)
    if fisher == "empirical":
        capture.state_mask(y != -100)
    else:
        capture.observe(logits.mT, "cross_entropy", target=y)
    token_loss(logits, y).backward()
    drained = capture.drain()
    assert float(drained["head"].positions) == int((y != -100).sum())
    assert float(drained["body"].positions) == sum(LENGTHS) - 1


def test_two_heads_with_targets_of_their_own() -> None:
    """The second head depends on rows that the first ignores."""
    model, (x, y) = Tokens(), batch()
    first, second = y.clone(), y.clone()
    first[:, 1:], second[:, 0] = -100, -100
    capture = armed_capture(model, fisher="mc", sums=frozenset({"A"}), samples=N)
    capture.state_examples(int(MASK.sum()))
    logits = model(x)
    for target in (first, second):
        capture.observe(logits.mT, "cross_entropy", target=target)
    drained = capture.drain()["layer"]
    assert float(drained.positions) == sum(LENGTHS)
    close(drained.sums["A"][0] / drained.examples, expected(model)[0])
    assert drained.samples is not None and drained.samples.positions.tolist() == LENGTHS


@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_sees_positions_first(batch_first: bool) -> None:
    """N and T are equal, so that nothing but the module itself tells how its inputs lie."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(Q, 1, batch_first=batch_first).double()
    x, _ = batch()
    given, mask = (x, MASK) if batch_first else (x.transpose(0, 1), MASK.T)
    capture = armed_capture(attention)
    capture.state_mask(MASK)
    output, _ = attention(given, given, given, key_padding_mask=~MASK, need_weights=False)
    output[mask].square().sum().backward()
    drained = capture.drain()
    assert set(drained) == {"q_proj", "k_proj", "v_proj", "out_proj"}
    tokens = torch.cat([x[MASK], torch.ones(sum(LENGTHS), 1, dtype=torch.float64)], 1)
    for name, each in drained.items():
        assert float(each.positions) == sum(LENGTHS), name
        if name != "out_proj":
            close(each.sums["A"][0], tokens.T @ tokens)


def test_reduce_takes_the_mean_of_what_counts() -> None:
    model, (x, _) = Tokens(), batch()
    lengths = torch.tensor([4, 2, 1, 0]).unsqueeze(1)  # an example without any has no row
    mask = torch.arange(T) < lengths
    (block,) = make_blocks("layer", model.layer, "reduce")
    assert isinstance(block, LinearBlock)
    capture = Capture(model, {"layer": block}, sampling=Sampling(), grad_scaler=None)
    capture.arm({"layer": Request()})
    capture.state_mask(mask)
    output = (model(x) * mask.unsqueeze(-1)).sum(1) / lengths.clamp_min(1)
    output.square().sum(1).mean().backward()
    drained = capture.drain()["layer"]
    a = torch.cat([(x * mask.unsqueeze(-1)).sum(1)[:3] / lengths[:3], torch.ones(3, 1, dtype=torch.float64)], 1)
    assert float(drained.positions) == 3
    close(drained.sums["A"][0], a.T @ a)
    g = 2 * output.detach()
    close(drained.sums["G"][0], g.T @ g)


@pytest.mark.parametrize("draws", [150, pytest.param(600, marks=pytest.mark.slow)])
@pytest.mark.parametrize("sampling", [Sampling(examples_fraction=0.5), Sampling(positions_fraction=0.5)], ids=str)
def test_sampled_estimates_are_unbiased_under_a_mask(sampling: Sampling, draws: int) -> None:
    model, (x, y) = Tokens(), batch()
    capture = armed_capture(model, sampling=sampling)
    found: dict[str, list[Tensor]] = {"A": [], "G": []}
    x[~MASK] = 1.0
    for seed in range(draws):
        capture.arm({"layer": Request(seed=seed)})
        capture.state_mask(MASK)
        capture.state_examples(int(MASK.sum()))
        token_loss(model(x), y).backward()
        drained = capture.drain()
        assert float(drained["layer"].positions) == sum(LENGTHS), "how many rows count is known, not sampled"
        for part, mean in zip(found.values(), factors_of(drained)["layer"], strict=True):
            part.append(mean[0])
        assert torch.linalg.eigvalsh(found["A"][-1]).min() > -1e-12, "the homogeneous coordinate is of the same rows"
    for part, truth in zip(found.values(), expected(model), strict=True):
        drawn = torch.stack(part)
        error = drawn.std(0) / len(drawn) ** 0.5
        assert ((drawn.mean(0) - truth).abs() <= 5 * error + 1e-12).all()


def test_padding_may_hold_anything() -> None:
    model, (x, y) = Tokens(), batch()
    x[~MASK] = torch.nan
    capture = armed_capture(model)
    capture.state_mask(MASK)
    capture.state_examples(int(MASK.sum()))
    F.cross_entropy(model(x)[MASK], y[MASK]).backward()
    for found, truth in zip(factors_of(capture.drain())["layer"], expected(model), strict=True):
        close(found[0], truth)


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (torch.ones(4, dtype=torch.bool), r"mask has shape \[4\]; must be a tensor \[N, T\]"),
        (torch.ones(4, 1, 4), r"mask has shape \[4, 1, 4\]"),
        ([[True]], "mask is a list"),
        (torch.tensor([[0.0, -1e9]]), "other numbers than 0 and 1"),
        (torch.tensor([[1, 2]]), "other numbers than 0 and 1"),
    ],
    ids=str,
)
def test_other_masks_are_refused(mask: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        armed_capture(Tokens()).state_mask(mask)


def test_masks_of_other_positions_do_not_apply() -> None:
    mask = torch.ones(2, 6, dtype=torch.bool)
    assert aligned(mask, (2, 5)) is None  # another sequence
    assert aligned(mask, (2, 1)) is None  # behind pooling
    for shape in ((2, 6), (6, 2), (12, 1)):
        found = aligned(mask, shape)
        assert found is not None and tuple(found.shape) == shape


def run(mask: Tensor | None, share: float) -> list[str]:
    """What a preconditioner says over three steps in which the loss ignores so many of the tokens."""
    model = Tokens()
    x = torch.randn(N, T, Q, dtype=torch.float64)
    keep = torch.arange(N * T).view(N, T) >= share * N * T
    with preconditioner(model, "kfac") as pre, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            model.zero_grad()
            if mask is not None:
                pre.batch(mask=mask)
            (model(x).square().sum(-1) * keep).sum().backward()
            pre.step()
    return [str(each.message) for each in caught if issubclass(each.category, KfdistWarning)]


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.125, 0), (0.5, 1)])
def test_many_zero_rows_are_warned_of_once(share: float, count: int) -> None:
    said = run(None, share)
    assert len(said) == count
    assert all(
        each.startswith(
            "50% or more of the examples' or positions' output gradients are exactly zero in half of the layers, as in "
            "'layer'"
        )
        and "batch(mask=...)" in each
        for each in said
    )


class LateCopy(HostCopy):
    """Reaches the host a step later, as a GPU's numbers do."""

    asked = 0

    def ready(self) -> bool:
        self.asked += 1
        return self.asked > 1


@pytest.mark.parametrize("masked", [False, True])
def test_counts_that_come_later_are_taken_at_a_step_that_measures_nothing(
    masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (padding, masking):
        monkeypatch.setattr(module, "HostCopy", LateCopy)
    model = Tokens()
    x, keep = torch.randn(N, T, Q, dtype=torch.float64), torch.arange(N * T).view(N, T) >= N * T / 2
    said = []
    with preconditioner(model, "kfac", factor_period=9, inverse_period=9) as pre:
        for step in range(4):
            model.zero_grad()
            if masked:
                pre.batch(mask=keep)
            (model(x).square().sum(-1) * keep).sum().backward()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                pre.step()
            said += [step for each in caught if issubclass(each.category, KfdistWarning)]
        assert not pre.pipeline.notices.coming
    assert said == ([] if masked else [1])


@pytest.mark.parametrize(("labelled", "stated", "count"), [(2, None, 1), (2, 2, 0), (5, None, 0)])
def test_a_loss_over_some_of_the_examples_is_warned_of(labelled: int, stated: int | None, count: int) -> None:
    """Nodes of a graph, of which some have labels."""
    model, x = nn.Linear(Q, 3), torch.randn(6, Q)
    with preconditioner(model, "kfac") as pre, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            model.zero_grad()
            if stated is not None:
                pre.batch(examples=stated)
            nn.functional.cross_entropy(model(x)[:labelled], torch.zeros(labelled, dtype=torch.int64)).backward()
            pre.step()
    said = [str(each.message) for each in caught if issubclass(each.category, KfdistWarning)]
    assert len(said) == count and all(
        "nodes without a label" in each and "batch(examples=...)" in each for each in said
    )


def test_zero_rows_that_were_not_there_at_first_are_told_as_examples_fitted_exactly() -> None:
    model, x = nn.Linear(Q, 3), torch.randn(6, Q)
    with preconditioner(model, "kfac") as pre, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for scale in (1.0, 1.0, 1e6):  # logits far apart at last: the softmax is 0 or 1
            model.zero_grad()
            model.weight.data.mul_(scale)
            logits = model(x)
            labels = logits.argmax(1)
            labels[4:] = (labels[4:] + 1) % 3  # two examples of six aren't fitted
            nn.functional.cross_entropy(logits, labels).backward()
            pre.step()
    said = [str(each.message) for each in caught if issubclass(each.category, KfdistWarning)]
    assert len(said) == 1 and "There were none at first" in said[0] and "batch(" not in said[0]


class Encoder(nn.Module):
    """A class token's output alone is used, by a head that may start at zero."""

    def __init__(self, *, zero_head: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 1, 8, dropout=0.0, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(4, 2)
        if zero_head:
            nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x)[:, 0])


@pytest.mark.parametrize("zero_head", [False, True])
def test_zero_rows_that_are_no_padding_are_not_warned_of(zero_head: bool) -> None:
    torch.manual_seed(0)
    model = Encoder(zero_head=zero_head)
    with preconditioner(model, "kfac") as pre, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            model.zero_grad()
            model(torch.randn(3, 12, 4)).sub(1).square().sum().backward()
            pre.step()
    assert not [each for each in caught if issubclass(each.category, KfdistWarning)]


def test_a_mask_silences_it() -> None:
    assert run(torch.ones(N, T, dtype=torch.bool), 0.5) == []


def test_batch_needs_something_to_state() -> None:
    with preconditioner(Tokens(), "kfac") as pre, pytest.raises(ConfigError, match="was told nothing"):
        pre.batch()


class Attention(nn.Module):
    """Self-attention, which puts the positions first inside, and a layer on flattened sequences; then a mean."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention, self.flat = nn.MultiheadAttention(Q, 1, batch_first=True), nn.Linear(Q, 2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        mixed, _ = self.attention(x, x, x, need_weights=False)
        return self.flat(mixed.flatten(0, 1)).view(len(x), -1, 2).mean(1)


@pytest.mark.parametrize("n", [1, 3, T])
def test_positions_of_an_example_are_known_wherever_they_lie(n: int) -> None:
    """Of 6 positions, 3 examples could be taken for pairs; of T, T examples for positions."""
    x = torch.randn(n, 6 if n < T else T, Q, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = Attention()
    capture = armed_capture(model, samples=n)
    model(x).square().sum(1).mean().backward()
    drained = capture.drain()
    assert set(drained) == {"attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.out_proj", "flat"}
    for name, each in drained.items():
        assert each.examples == n and each.positions == x.shape[0] * x.shape[1], name
        assert each.samples is not None
        losses = model(x).square().sum(1)
        expected = per_example_gradients(blocks_of(model)[name], losses)
        close(torch.einsum("cntp,cntq->ncpq", each.samples.g, each.samples.a), expected)


def test_reduce_pools_positions_wherever_they_lie() -> None:
    x = torch.randn(T, T, Q, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = Attention()
    blocks = {
        block.name: block
        for name in ("attention", "attention.out_proj", "flat")
        for block in make_blocks(name, model.get_submodule(name), "reduce")
        if isinstance(block, LinearBlock)
    }
    capture = Capture(model, blocks, sampling=Sampling(), grad_scaler=None)
    capture.arm(dict.fromkeys(blocks, Request()))
    model(x).square().sum(1).mean().backward()
    means = torch.cat([x.mean(1), torch.ones(T, 1, dtype=torch.float64)], 1)
    for name, each in capture.drain().items():
        assert each.positions == T, name
        if name in ("attention.q_proj", "attention.k_proj", "attention.v_proj"):
            close(each.sums["A"][0], means.T @ means)


def test_cross_sums_count_an_input_once_however_many_heads_there_are() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(Q, 3), nn.Tanh(), nn.Linear(3, C)).double()
    x, y = torch.randn(N, Q, dtype=torch.float64), torch.arange(N)
    sums = frozenset({"A", "a_cross"})
    capture = armed_capture(model, fisher="mc", coarse=[["0", "2"]], sums=sums)
    output = model(x)
    for _ in range(2):
        capture.observe(output, "cross_entropy", target=y)
    found = capture.drain()["0"]
    close(found.sums["a_cross"][0], found.sums["A"].sum())

"""What a Preconditioner answers: `coverage()`, and what it warns of."""

import warnings
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from kfdist.errors import KfdistWarning
from tests.support.preconditioning import backward, preconditioner, rows, two_layers


def test_blocks_that_are_due_and_not_measured_are_warned_of_once_and_shown_by_coverage():
    model = two_layers()
    with preconditioner(model) as pre:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        with pytest.warns(
            KfdistWarning, match=r"2 of the blocks were due at step 0 .*: '0', '2': no use of it was seen"
        ):
            pre.step()
        assert "not measured: no use of it was seen" in str(pre.coverage())
        with warnings.catch_warnings():
            warnings.simplefilter("error", KfdistWarning)
            pre.step()


def test_training_in_eval_mode_throughout_is_noticed_at_the_first_step():
    model = two_layers().eval()
    with preconditioner(model) as pre:
        backward(model)
        with pytest.warns(KfdistWarning, match=r"'0', '2': it was used in eval mode alone; call model\.train\(\)"):
            pre.step()
        assert "used in eval mode alone" in str(pre.coverage())
        model.train()
        model.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("error", KfdistWarning)
            with torch.no_grad():
                model.eval()(rows()[0])
            model.train()
            backward(model)
            pre.step()
        assert "eval mode" not in str(pre.coverage())


@pytest.mark.parametrize(("frozen", "noticed"), [(["weight"], True), (["bias"], True), (["weight", "bias"], False)])
def test_a_norm_in_eval_mode_is_noticed_unless_all_of_it_is_frozen(frozen: list[str], noticed: bool):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)).double()
    with preconditioner(model, "kfac") as pre, warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always", KfdistWarning)
        for name in frozen:
            model.get_parameter(f"1.{name}").requires_grad_(False)
        model[1].eval()
        backward(model)
        pre.step()
    said = [str(each.message) for each in heard if issubclass(each.category, KfdistWarning)]
    assert len(said) == noticed
    assert not said or "'1': it was used in eval mode alone" in said[0]


def test_what_uses_a_weight_and_cannot_be_measured_is_named():
    class Quadratic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("ni,ij,nj->n", x, self.layer.weight, x)

    model = Quadratic()
    with preconditioner(model) as pre:
        model(torch.randn(4, 3)).mean().backward()
        with pytest.warns(KfdistWarning, match=r"'layer': it is used by einsum, which can't be measured"):
            pre.step()


class Twice(nn.Module):
    """A weight whose product is taken, and what cannot be measured."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 3, bias=False), nn.Linear(3, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x)) + self.first.weight.exp().sum()


def test_a_block_of_which_some_uses_are_measured_counts_apart():
    model = Twice()
    with preconditioner(model) as pre:
        assert (pre.coverage().share, pre.coverage().share_in_part) == (1.0, 0.0)
        model(torch.randn(4, 3)).mean().backward()
        with pytest.warns(KfdistWarning, match=r"1 of the blocks .*'first': it is also used by exp") as heard:
            pre.step()
        assert len(heard) == 1 and "A use is seen inside a module" not in str(heard[0].message)
        coverage = pre.coverage()
        first, last = coverage.rows
        assert (first.in_part, first.measured, last.in_part) == (True, True, False)
        assert first.inversion == "in part: it is also used by exp, which can't be measured"
        assert (coverage.share, coverage.share_in_part) == (pytest.approx(6 / 15), pytest.approx(9 / 15))
        assert "40.00% of 15 trained parameters are preconditioned, 60.00% more by a part of" in str(coverage)


@pytest.mark.parametrize(("skip", "share"), [((), 1.0), (("2",), 0.0)])
def test_what_is_frozen_counts_apart_from_what_is_trained(skip: tuple[str, ...], share: float):
    model = two_layers()
    with preconditioner(model, skip=skip) as pre:
        before = pre.coverage()
        assert (before.trained, before.frozen) == (25 + 18, 0)
        assert "frozen" not in str(before)
        model[0].requires_grad_(False)
        backward(model)
        pre.step()
        coverage = pre.coverage()
        assert (coverage.trained, coverage.frozen, coverage.share) == (18, 25, share)
        assert [(row.elements, row.frozen) for row in coverage.rows] == [(0, 20), (0, 5), (15, 0), (3, 0)]
        assert [row.block for row in coverage.rows[:2]] == ["0", "0"]
        lines = str(coverage).splitlines()
        assert ["frozen" in line for line in lines[:4]] == [True, True, False, False]
        assert lines[4] == f"{share:.2%} of 18 trained parameters are preconditioned; 25 more are frozen"
        model[0].requires_grad_(True)
        assert pre.coverage() == before


def test_what_was_frozen_when_it_was_made_counts_apart_too():
    model = two_layers()
    model[0].requires_grad_(False)
    with preconditioner(model) as pre:
        coverage = pre.coverage()
        assert (coverage.trained, coverage.frozen, coverage.share) == (18, 25, 1.0)
        model.append(nn.Linear(2, 2).requires_grad_(False))
        assert (pre.coverage().trained, pre.coverage().frozen) == (18, 25 + 6)
        model.get_parameter("0.weight").requires_grad_(True)
        coverage = pre.coverage()
        assert (coverage.trained, coverage.frozen, coverage.share) == (18 + 20, 5 + 6, 18 / 38)


def test_a_batch_without_examples_is_named_and_what_is_wrong_later_too():
    torch.manual_seed(0)
    layers = nn.Linear(4, 4), nn.LayerNorm(4), nn.Unflatten(1, (4, 1)), nn.Conv1d(4, 3, 1)
    model = nn.Sequential(*layers).double()
    with preconditioner(model, "kfac") as pre:
        model(rows(0)[0]).sum().backward()
        with pytest.warns(KfdistWarning, match=r"its batch had no examples\. What isn't measured"):
            pre.step()
        assert pre.coverage().share == 0 and str(pre.coverage()).count("not measured: its batch had no examples") == 6
        model.zero_grad()
        model(rows(5)[0]).square().mean().backward()
        pre.step()
        assert pre.coverage().share == 1
        model.zero_grad()
        model.eval()(rows(5)[0]).square().mean().backward()
        with pytest.warns(KfdistWarning, match="it was used in eval mode alone"):
            pre.step()


class Everything(nn.Module):
    """Kinds of layers that meet sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(5, 4), nn.Embedding(3, 4)
        self.bags, self.recurrent = nn.EmbeddingBag(5, 4), nn.LSTM(4, 4, batch_first=True)
        self.attention = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.maps = nn.Sequential(nn.Conv1d(4, 4, 2), nn.GroupNorm(2, 4), nn.ConvTranspose1d(4, 4, 2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.recurrent(self.words(x) + self.places(torch.arange(3)))[0]
        return self.maps(self.attention(h).mT).mean(-1) + self.bags(x)


@pytest.mark.parametrize("fisher", ["empirical", "mc", "exact"])
def test_a_batch_without_examples_breaks_no_layer(fisher: Literal["empirical", "mc", "exact"]):
    model = Everything()
    with preconditioner(model, "kfac", fisher=fisher) as pre, pytest.warns(KfdistWarning, match="no examples") as heard:
        output = model(torch.zeros(0, 3, dtype=torch.int64))
        pre.observe(output, "mse")
        output.sum().backward()
        pre.step()
        assert pre.coverage().share == 0
    assert len(heard) == 1 and str(heard[0].message).count("its batch had no examples") == 1


def test_layers_of_one_kind_and_reason_are_said_as_one():
    model = nn.Sequential(*(Twice() for _ in range(7)), nn.Linear(2, 2))
    x = torch.randn(4, 3)

    def forward(x: Tensor) -> Tensor:
        return model[7](x[:, 1:]).sum() + sum(model[i](x).sum() for i in range(7))

    model.forward = forward  # type: ignore[method-assign]
    with preconditioner(model) as pre:
        model(x).backward()
        with pytest.warns(KfdistWarning, match=r"7 of the blocks .*measured: '\*\.first' \(7\): it is also") as heard:
            pre.step()
    assert len(str(heard[0].message)) < 400


class Prompted(nn.Module):
    """A model whose first input may be empty."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, prompt: Tensor, x: Tensor) -> Tensor:
        return self.layer(self.norm(x)) + prompt.sum()


def test_an_empty_first_input_breaks_no_norm():
    model = Prompted()
    with preconditioner(model, "kfac") as pre, pytest.warns(KfdistWarning, match="its batch had no examples"):
        model(torch.zeros(0, 4), torch.randn(5, 4)).square().mean().backward()
        pre.step()
        assert pre.coverage().share == 0

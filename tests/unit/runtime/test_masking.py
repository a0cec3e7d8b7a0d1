"""What masks left out is in `coverage()`; one that fits nothing, or isn't one, is warned of once."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kfdist.capture import masks
from kfdist.errors import KfdistWarning
from tests.support.preconditioning import preconditioner

N, T, Q = 4, 6, 3


class Pooled(nn.Module):
    """A layer of tokens and one behind their mean."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.head = nn.Linear(Q, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.tokens(x)).mean(1))


class Experts(nn.Module):
    """One matrix each for the even and the odd tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.Parameter(torch.randn(2, 5, Q))

    def forward(self, x: Tensor) -> Tensor:
        pairs = x.unflatten(1, (-1, 2)).transpose(1, 2).transpose(0, 1).flatten(1, 2)
        return torch.bmm(pairs, self.experts.transpose(1, 2)).tanh().sum(0).view(len(x), -1, 5)


def run(model: nn.Module, mask: Any, *, steps: int = 2) -> tuple[list[str], str]:
    """What is said in a few steps in which the mask leaves tokens out of the loss, and at the end of `coverage()`."""
    with preconditioner(model, "kfac") as pre, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            model.zero_grad()
            if mask is not None:
                pre.batch(mask=mask)
            model(torch.randn(N, T, Q)).square().sum(-1).mean().backward()
            pre.step()
        said = [str(each.message) for each in caught if issubclass(each.category, KfdistWarning)]
        return said, str(pre.coverage()).splitlines()[-1]


def test_coverage_says_how_much_a_mask_left_out() -> None:
    model = nn.Sequential(nn.Linear(Q, 5), nn.Tanh(), nn.Linear(5, 2))
    keep = torch.arange(T) < torch.tensor([6, 3, 3, 0]).unsqueeze(1)
    with preconditioner(model, "kfac") as pre:
        assert "mask" not in str(pre.coverage())
        for step in range(2):
            model.zero_grad()
            pre.batch(mask=keep)
            (model(torch.randn(N, T, Q)).square().sum(-1) * keep).sum().backward()
            pre.step()
            said = f"a mask is in use: at step {step} it left out 50.0% of the rows of 2 blocks"
            assert pre.coverage().mask == said and str(pre.coverage()).endswith(said)


def test_layers_behind_pooling_are_told() -> None:
    said, last = run(Pooled(), torch.ones(N, T, dtype=torch.bool))
    assert not said
    assert last == (
        "a mask is in use: at step 1 it left out 0.0% of the rows of 1 blocks; the inputs of 1 have other positions "
        "('head' has 4 x 1)"
    )


def test_a_mask_that_fits_no_layer_is_warned_of_once() -> None:
    said, last = run(Pooled(), torch.ones(N, T + 1, dtype=torch.bool), steps=3)
    (text,) = said
    assert text.startswith("batch(mask=...) was given a mask [4, 7] that fits no layer ('tokens' has 4 x 6)")
    assert "mask" not in last


def test_a_mask_where_nothing_has_positions_fits_no_layer() -> None:
    said, _ = run(nn.Sequential(nn.Unflatten(1, (1, T)), nn.Conv2d(1, 2, 3)), torch.ones(N, T, dtype=torch.bool))
    assert ["fits no layer, so that nothing" in each for each in said] == [True]


def test_of_experts_it_is_said_what_is_taken_for_padding() -> None:
    said, last = run(Experts(), torch.ones(N, T, dtype=torch.bool))
    assert not said and last.endswith("; of experts, rows without any gradient were taken for what it leaves out")


def test_numbers_that_only_the_device_knows_are_warned_of_when_they_have_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "_on_host", lambda tensor: False)
    model = nn.Sequential(nn.Linear(Q, 5), nn.Tanh(), nn.Linear(5, 2))
    assert run(model, torch.ones(N, T))[0] == []
    (text,) = run(model, torch.full((N, T), 2))[0]
    assert "other numbers than 0 and 1, of which all but 0 count as 1" in text


@pytest.mark.parametrize(
    ("ignored", "padded", "count"),
    [(True, False, 1), (False, False, 0), (True, True, 0)],
    ids=["cut", "none", "padded"],
)
def test_targets_of_other_positions_than_the_layers_are_warned_of_once(ignored: bool, padded: bool, count: int) -> None:
    """Shifted labels belong to `logits[:, :-1]`, and no layer has so many positions."""
    model, labels = nn.Sequential(nn.Linear(Q, 5), nn.Tanh(), nn.Linear(5, 4)), torch.randint(0, 4, (N, T))
    labels[:, T - 2 :] = -100 if ignored else 0
    with preconditioner(model, "kfac", fisher="mc") as pre, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            model.zero_grad()
            logits, target = model(torch.randn(N, T, Q)), labels[:, 1:]
            if padded:
                target = nn.functional.pad(target, (0, 1), value=-100)
            else:
                logits = logits[:, :-1]
            pre.observe(logits.mT, "cross_entropy", target=target)
            nn.functional.cross_entropy(logits.mT, target).backward()
            pre.step()
    said = [str(each.message) for each in caught if issubclass(each.category, KfdistWarning)]
    said = [each for each in said if "observe()" in each]  # where many rows are zero, that is said too
    assert len(said) == count
    assert all("F.pad(labels[:, 1:], (0, 1), value=-100)" in each and f"has {N} x {T}" in each for each in said)

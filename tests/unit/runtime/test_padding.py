"""Output gradients that are zero are judged over all layers, however few a step measures."""

import warnings

import pytest
import torch
from torch import nn

import kfdist
from kfdist.errors import KfdistWarning
from kfdist.runtime.padding import PaddingNotice


def counts(**zeros: int) -> dict[str, tuple[torch.Tensor, int]]:
    return {name: (torch.tensor(zero), 10) for name, zero in zeros.items()}


def test_a_step_that_measures_the_last_layers_alone_is_no_padding() -> None:
    notice = PaddingNotice()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        notice.look(counts(a=0, b=0, c=8, d=10), level=1)  # all of d's rows: its head starts at zero
        notice.look(counts(c=9, d=9), level=1)
    with pytest.warns(KfdistWarning, match="50% or more .* as in 'a'"):
        notice.look(counts(a=5), level=1)


class ClassToken(nn.Module):
    """Reads a sequence's first position alone, as a vision transformer does."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True) for _ in range(3))
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x)[:, 0])


def test_a_class_token_is_no_padding() -> None:
    torch.manual_seed(0)
    model = ClassToken()
    with warnings.catch_warnings(), kfdist.Preconditioner(model, lr=1e-3) as preconditioner:
        warnings.simplefilter("error", KfdistWarning)
        for _ in range(12):  # each block is measured once more after the first step
            model.zero_grad()
            loss = nn.functional.cross_entropy(model(torch.randn(16, 10, 8)), torch.randint(3, (16,)))
            loss.backward()
            preconditioner.step()

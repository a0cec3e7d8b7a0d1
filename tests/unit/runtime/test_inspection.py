"""What a Preconditioner answers: `coverage()`, and what it warns of."""

import warnings

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
        with pytest.warns(KfdistWarning, match=r"2 of the blocks were due at step 0 .*'0': no use of it was seen"):
            pre.step()
        assert "not measured as a whole: no use of it was seen" in str(pre.coverage())
        with warnings.catch_warnings():
            warnings.simplefilter("error", KfdistWarning)
            pre.step()


def test_training_in_eval_mode_throughout_is_noticed_at_the_first_step():
    model = two_layers().eval()
    with preconditioner(model) as pre:
        backward(model)
        with pytest.warns(KfdistWarning, match=r"'0': it was used in eval mode alone; call model\.train\(\)"):
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

"""Steps under a GradScaler: the same numbers, and an overflow that leaves no trace."""

import pytest
import torch
from torch import nn

import kfdist
from kfdist.errors import KfdistError
from tests.support.factors import assert_factors_equal
from tests.support.preconditioning import backward, factors, preconditioner, rows, two_layers

EXACT = 1e-10
"""float64; sums of a few dozen rows."""


def overflowing(model: nn.Module, scaler: torch.amp.GradScaler) -> None:
    """A backward that overflows: finite loss, infinite gradients."""
    backward_scaled(model, scaler)
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.grad.fill_(torch.inf)


def backward_scaled(model: nn.Module, scaler: torch.amp.GradScaler, seed: int = 0) -> None:
    x, y = rows(seed=seed)
    scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()


def amp_step(
    pre: kfdist.Preconditioner, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, *, by_hand: bool
) -> None:
    if by_hand:
        scaler.unscale_(optimizer)
        pre.step()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


@pytest.mark.parametrize("by_hand", [True, False], ids=["by hand", "attached"])
def test_scaled_training_equals_unscaled(by_hand: bool):
    parameters, measured = [], []
    for enabled in (False, True):
        model = two_layers()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=enabled)
        with preconditioner(model, grad_scaler=scaler) as pre:
            if not by_hand:
                pre.attach(optimizer)
            for seed in range(3):
                backward_scaled(model, scaler, seed)
                amp_step(pre, optimizer, scaler, by_hand=by_hand)
            measured.append(factors(pre))
        parameters.append(list(model.parameters()))
    assert_factors_equal(measured[1], measured[0], EXACT)
    for mine, theirs in zip(*parameters, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=EXACT, atol=EXACT)


def test_gradients_that_are_still_scaled_are_an_error_with_the_remedy():
    model = two_layers()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with preconditioner(model, grad_scaler=scaler) as pre:
        for _ in range(2):  # also after an update
            backward_scaled(model, scaler)
            with pytest.raises(KfdistError, match=r"call scaler\.unscale_\(optimizer\) before"):
                pre.step()
            amp_step(pre, optimizer, scaler, by_hand=True)


def test_a_fused_optimizer_that_unscales_in_its_kernel_is_an_error_with_the_remedy():
    """The scaler checks for overflow but leaves the gradients scaled; `unscale_` before makes it right."""
    model = two_layers()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with preconditioner(model, lr=None, grad_scaler=scaler).attach(optimizer) as pre:
        backward_scaled(model, scaler)
        with pytest.raises(KfdistError, match=r"call scaler\.unscale_\(optimizer\) before"):
            scaler.step(optimizer)
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        assert pre.next_step == 1


def test_an_overflowed_step_changes_no_statistics_and_time_goes_on():
    model = two_layers()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with preconditioner(model, grad_scaler=scaler) as pre:
        backward_scaled(model, scaler)
        amp_step(pre, optimizer, scaler, by_hand=True)
        before = pre.state_dict()["sums"]
        parameters = [parameter.detach().clone() for parameter in model.parameters()]
        overflowing(model, scaler)
        amp_step(pre, optimizer, scaler, by_hand=True)
        after = pre.state_dict()["sums"]
        assert scaler.get_scale() == 512.0, "it was to overflow"
        for name, sums in before.items():
            assert all(torch.equal(after[name][key], sums[key]) for key in ("A", "G", "n_examples", "n_positions"))
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), parameters, strict=True))
        assert pre.next_step == 2
        assert set(pre.versions().values()) == {1}, "the schedule's inversion was made"


def test_an_overflow_at_the_very_first_step():
    """Usual with a scale of 65536: there is nothing to invert yet, and the next step asks again."""
    model = two_layers()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with preconditioner(model, grad_scaler=scaler, factor_period=10, inverse_period=100) as pre:
        overflowing(model, scaler)
        amp_step(pre, optimizer, scaler, by_hand=True)
        assert set(pre.versions().values()) == {-1}
        backward_scaled(model, scaler)
        amp_step(pre, optimizer, scaler, by_hand=True)
        assert set(pre.versions().values()) == {1}


def test_a_step_that_the_scaler_skipped_leaves_its_batch_out_of_the_next_ones_statistics():
    model = two_layers()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with preconditioner(model, lr=None, grad_scaler=scaler).attach(optimizer) as pre:
        overflowing(model, scaler)
        amp_step(pre, optimizer, scaler, by_hand=False)
        assert pre.next_step == 0, "the optimizer's step was skipped, and ours with it"
        backward_scaled(model, scaler, seed=1)
        amp_step(pre, optimizer, scaler, by_hand=False)
        measured = factors(pre)
    twin = two_layers()
    with preconditioner(twin) as pre:
        backward(twin, seed=1)
        pre.step()
        assert_factors_equal(measured, factors(pre), EXACT)

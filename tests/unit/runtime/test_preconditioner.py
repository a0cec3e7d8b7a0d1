"""The public Preconditioner: its direction, its scope, its checks."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import kfdist
from kfdist.curvature.references import dense_kronecker, solve_dense
from kfdist.errors import ConfigError, ModelChanged
from tests.support.factors import assert_factors_equal, blocks_of
from tests.support.preconditioning import backward, factors, gradients, preconditioner, rows, two_layers

EXACT = 1e-10
"""float64; at a damping of 0.1 the dense problem's condition number is below 1e4."""


def direction(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: block.gradient() for name, block in blocks_of(model).items()}


def test_a_step_is_the_dense_solve_of_what_was_measured():
    model = two_layers()
    with preconditioner(model, kl_clip=None) as pre:
        backward(model)
        V = direction(model)
        pre.step()
        for name, (A, G) in factors(pre).items():
            expected = solve_dense(dense_kronecker(A, G), 0.1, V[name])
            torch.testing.assert_close(direction(model)[name], expected, rtol=EXACT, atol=EXACT)


def test_several_steps_fold_with_the_decay():
    model = two_layers()
    alone = []
    for seed in range(4):
        twin = two_layers()
        with preconditioner(twin) as pre:
            backward(twin, seed=seed)
            pre.step()
            alone.append(factors(pre))
    with preconditioner(model, ema_decay=0.6) as pre:
        for seed in range(4):
            model.zero_grad()
            backward(model, seed=seed)
            pre.step()
        measured = factors(pre)
    for name in measured:
        for index in (0, 1):
            expected = alone[0][name][index]
            for rho, new in zip((0.5, 0.6, 0.6), alone[1:], strict=True):
                expected = rho * expected + (1 - rho) * new[name][index]
            torch.testing.assert_close(measured[name][index], expected, rtol=EXACT, atol=EXACT)


def test_only_due_blocks_are_folded():
    """Two groups, factors every 2 and inverses every 4 steps: the second's phase is 3."""
    model = two_layers()
    weights = []
    with preconditioner(model, factor_period=2, inverse_period=4, ema_decay=0.0) as pre:
        for step in range(6):
            model.zero_grad()
            backward(model, n=step + 1, seed=step)
            pre.step()
            weights.append({name: float(each["n_examples"]) for name, each in pre.state_dict()["sums"].items()})
    assert [each["0"] for each in weights] == [1, 1, 3, 3, 5, 5]
    assert [each["2"] for each in weights] == [1, 2, 2, 4, 4, 6]


def test_a_batch_that_is_not_finite_is_dropped_and_the_next_one_taken():
    model = two_layers()
    with preconditioner(model) as pre:
        x, y = rows()
        x[2, 1] = torch.nan
        nn.functional.cross_entropy(model(x), y).backward()
        pre.step()
        assert factors(pre) == {}, "there are no statistics"
        assert pre.versions() == {"0": -1, "2": -1}
        model.zero_grad()
        backward(model)
        pre.step()
        measured = factors(pre)
        assert pre.versions() == {"0": 1, "2": 1}, "asked for again as soon as there are some"
        assert all(float(each["dropped"]) == 1 for each in pre.state_dict()["sums"].values())
    twin = two_layers()
    with preconditioner(twin) as alone:
        backward(twin)
        alone.step()
        assert_factors_equal(measured, factors(alone), EXACT)


def test_two_preconditioners_on_two_models_do_not_mix():
    first, second = two_layers(0), two_layers(1)
    expected = []
    for model, seed in ((two_layers(0), 3), (two_layers(1), 4)):
        with preconditioner(model) as pre:
            backward(model, seed=seed)
            pre.step()
            expected.append((factors(pre), gradients(model)))
    with preconditioner(first) as a, preconditioner(second) as b:
        backward(first, seed=3)
        backward(second, seed=4)
        b.step()
        a.step()
        for pre, model, (of_model, direction) in zip((a, b), (first, second), expected, strict=True):
            assert_factors_equal(factors(pre), of_model, 0.0)
            assert all(torch.equal(mine, theirs) for mine, theirs in zip(gradients(model), direction, strict=True))


def test_a_gan_loop():
    """The discriminator's own statistics come from its own loss; the generator's loss goes through it paused."""
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    discriminator = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    torch.manual_seed(0)
    twin = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    twin_discriminator = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    criterion = nn.functional.binary_cross_entropy_with_logits
    real, noise = rows()[0], torch.randn(8, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    labels = torch.cat([torch.ones(8, 1), torch.zeros(8, 1)]).double()

    with preconditioner(generator) as pre_g, preconditioner(discriminator) as pre_d:
        for _ in range(2):
            fake = generator(noise)
            batch = torch.cat([real, fake.detach()])
            discriminator.zero_grad()
            criterion(discriminator(batch), labels).backward()
            pre_d.step()

            generator.zero_grad()
            with pre_d.paused():
                loss = criterion(discriminator(fake), torch.ones(8, 1).double())
            loss.backward()
            pre_g.step()
        measured = factors(pre_d), factors(pre_g)

    with preconditioner(twin_discriminator) as pre:
        batch = torch.cat([real, twin(noise).detach()])
        criterion(twin_discriminator(batch), labels).backward()
        pre.step()
        assert_factors_equal(measured[0], factors(pre), EXACT)
    with preconditioner(twin) as pre:
        criterion(twin_discriminator(twin(noise)), torch.ones(8, 1).double()).backward()
        pre.step()
        assert_factors_equal(measured[1], factors(pre), EXACT)


# After construction the model stays as it is --------------------------------------------------------------------------


def replace(model: nn.Sequential) -> None:
    model[2] = nn.Linear(5, 3).double()


def remove(model: nn.Sequential) -> None:
    del model[2]


def replace_the_weight(model: Any) -> None:
    model[2].weight = nn.Parameter(model[2].weight.detach().clone())


def remove_the_bias(model: Any) -> None:
    model[2].bias = None


def resize(model: Any) -> None:
    model[2].weight.data = torch.zeros(3, 7).double()


def transpose(model: Any) -> None:
    model[2].weight.data = model[2].weight.data.T.contiguous()


def parametrize(model: nn.Sequential) -> None:
    nn.utils.parametrizations.weight_norm(model[2])


def convert(model: nn.Sequential) -> None:
    model[2].to(torch.float32)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (replace, "replaced"),
        (remove, "removed"),
        (replace_the_weight, "replaced"),
        (remove_the_bias, "replaced"),
        (resize, "resized"),
        (transpose, "resized"),
        (parametrize, "replaced"),
        (convert, "converted from torch.float64 to torch.float32"),
    ],
)
def test_a_changed_layer_is_named(change: Callable[[nn.Sequential], None], said: str):
    model = two_layers()
    with preconditioner(model) as pre:
        backward(model)
        change(model)
        with pytest.raises(ModelChanged, match=f"layer '2' was .*{said}.*make a new Preconditioner"):
            pre.step()


@pytest.mark.parametrize("done", [0, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", ["kfac-eigen", "ekfac", "b-kfac", "seng", "ekfac-adam", "soap"])
def test_a_converted_model_is_refused_at_the_next_step(method: str, dtype: torch.dtype, done: int):
    """Also before the first one, and after a forward and backward of what it is by now, which fail in no other way."""
    model = two_layers().float()
    x, y = rows()
    with preconditioner(model, method, kl_clip=None) as pre:
        for _ in range(done):
            model.zero_grad()
            nn.functional.cross_entropy(model(x.float()), y).backward()
            pre.step()
        model.to(dtype)
        model.zero_grad()
        nn.functional.cross_entropy(model(x.to(dtype)), y).backward()
        before = gradients(model)
        with pytest.raises(ModelChanged, match=f"layer '0.*' was converted from torch.float32 to {dtype} .*make a new"):
            pre.step()
        assert all(torch.equal(mine, old) for mine, old in zip(gradients(model), before, strict=True))
    with preconditioner(model, method, kl_clip=None) as pre:  # a new one of the model as it is now
        model.zero_grad()
        nn.functional.cross_entropy(model(x.to(dtype)), y).backward()
        pre.step()
        assert all(version == 0 for version in pre.versions().values())


def test_wrapping_a_layer_afterwards_is_no_change():
    model = two_layers()
    with preconditioner(model) as pre:
        backward(model)
        wrapped: Any = torch.compile(model[2], backend="eager")
        model[2] = wrapped
        assert pre.step().step == 0


# Arguments ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("damping", 0.0, "a finite number above 0"),
        ("damping", float("nan"), "a finite number above 0"),
        ("damping", float("inf"), "a finite number above 0"),
        ("damping", "1e-3", "a finite number above 0"),
        ("damping", True, "a finite number above 0"),
        ("ema_decay", 1.0, "at least 0 and below 1"),
        ("ema_decay", -0.1, "at least 0 and below 1"),
        ("ema_decay", None, "at least 0 and below 1"),
        ("kl_clip", 0.0, "or None, which turns the clip off"),
        ("kl_clip", "x", "or None, which turns the clip off"),
        ("lr", -0.1, "at least 0"),
        ("fisher", "true", "choose one of 'empirical', 'mc', 'exact'"),
        ("factor_period", 0, "at least 1"),
        ("inverse_period", 2.5, "at least 1"),
        ("adoption", "sync", r"kfdist\.FixedLag\(k\)"),
        ("adoption", kfdist.Asap(hard_bound=1), "the smallest legal value is 2"),
        ("sampling", 0.5, r"kfdist\.Sampling"),
        ("weight_sharing", "pool", "choose one of 'expand', 'reduce'"),
        ("seed", -1, "at least 0"),
        ("digest_period", -1, "0 for none"),
        ("digest_period", 1.5, "0 for none"),
        ("skip", ("nothing",), "matches no layer"),
        ("method", "kfak", "kfac"),
    ],
)
def test_bad_arguments_are_refused_by_name_and_leave_no_hook(name: str, value: Any, said: str):
    model = two_layers()
    with pytest.raises(ConfigError, match=said) as raised:
        preconditioner(model, **{name: value})
    assert repr(value) in str(raised.value) or name in ("adoption", "skip"), "the value received is named"
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_single_glob_to_skip_may_be_given_as_a_string():
    with preconditioner(two_layers(), skip="0") as pre:
        assert list(pre.versions()) == ["2"]


def test_inverse_period_between_multiples_names_the_legal_ones():
    with pytest.raises(ConfigError, match="take 20 or 30"):
        preconditioner(two_layers(), factor_period=10, inverse_period=25)


def test_a_model_that_is_one_layer_works():
    model = nn.Linear(4, 3).double()
    with preconditioner(model, kl_clip=None) as pre:
        backward(model)
        V = direction(model)[""]
        pre.step()
        ((A, G),) = factors(pre).values()
        torch.testing.assert_close(
            direction(model)[""], solve_dense(dense_kronecker(A, G), 0.1, V), rtol=EXACT, atol=EXACT
        )

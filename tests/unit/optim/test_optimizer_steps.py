"""`kfdist.Optimizer` against the formulas: directions by graft, momentum, decay, and what has no block."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfdist
from kfdist.errors import ConfigError, KfdistError, KfdistWarning
from kfdist.optim.graft import grafted
from tests.support.optimizing import BETAS, DECAY, EPS, LR, SYNCHRONOUS, backward, optimizer_of, small_model, train
from tests.support.preconditioning import rows

EXACT = 1e-12
"""float64, the same operations in another order."""


def assert_close(mine: list[Tensor], theirs: list[Tensor], tolerance: float = EXACT) -> None:
    assert len(mine) == len(theirs)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# A plain reference, one parameter at a time ---------------------------------------------------------------------------


class PlainAdamw:
    """V / (sqrt(v_hat) + eps) for a block, and m_hat in the place of V for the others."""

    def __init__(self) -> None:
        self.m = self.v = 0.0
        self.t = 0

    def update(self, gradient: Tensor, blocked: bool) -> Tensor:
        self.t += 1
        self.m = BETAS[0] * self.m + (1 - BETAS[0]) * gradient
        self.v = BETAS[1] * self.v + (1 - BETAS[1]) * gradient**2
        first = gradient if blocked else self.m / (1 - BETAS[0] ** self.t)
        return first / ((self.v / (1 - BETAS[1] ** self.t)).sqrt() + EPS)


class PlainGradient:
    def update(self, gradient: Tensor, blocked: bool) -> Tensor:
        del blocked
        return gradient


class PlainAverage:
    def __init__(self) -> None:
        self.m = 0.0
        self.t = 0

    def of(self, step: Tensor) -> Tensor:
        self.t += 1
        self.m = BETAS[0] * self.m + (1 - BETAS[0]) * step
        return self.m / (1 - BETAS[0] ** self.t)


class PlainMomentum:
    def __init__(self) -> None:
        self.m = 0.0

    def of(self, step: Tensor) -> Tensor:
        self.m = BETAS[0] * self.m + step
        return self.m


def reference(graft: str, steps: int = 4) -> list[Tensor]:
    """Trains `small_model` by the formulas alone; directions are those that `Preconditioner.step` writes."""
    model = small_model()
    kind, momentum = (PlainAdamw, PlainAverage) if graft == "adamw" else (PlainGradient, PlainMomentum)
    updates, momenta = [[each() for _ in model.parameters()] for each in (kind, momentum)]
    with kfdist.Preconditioner(model, **SYNCHRONOUS, skip=("2",), kl_clip=None) as preconditioner, torch.no_grad():
        for seed in range(steps):
            with torch.enable_grad():
                backward(model, seed)
            plain = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            preconditioner.step()
            for place, (p, gradient) in enumerate(zip(model.parameters(), plain, strict=True)):
                direction = p.grad
                assert direction is not None
                blocked = not torch.equal(direction, gradient)  # the norm has no block
                update = updates[place].update(gradient, blocked)
                if not blocked:
                    moved = momenta[place].of(gradient) if graft == "sgd" else update
                else:
                    moved = momenta[place].of(update.norm() / direction.norm() * direction)
                p.mul_(1 - LR * DECAY).sub_(LR * moved)
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("graft", ["adamw", "sgd"])
def test_grafted_steps_are_those_of_the_formulas(graft: Any):
    model = small_model()
    with optimizer_of(model, graft=graft, skip=("2",)) as optimizer:
        assert_close(train(model, optimizer), reference(graft))


@pytest.mark.parametrize("kl_clip", [None, 1e-3])
def test_without_a_graft_blocks_are_stepped_as_by_preconditioner_and_sgd(kl_clip: float | None):
    model, other = (nn.Sequential(*list(small_model())[::3]) for _ in range(2))  # linear layers alone
    other[0].out_features = model[0].out_features
    with optimizer_of(model, graft=None, kl_clip=kl_clip, weight_decay=0.0) as optimizer:
        mine = train(model, optimizer)
    sgd = torch.optim.SGD(other.parameters(), lr=LR, momentum=BETAS[0])
    with kfdist.Preconditioner(other, **SYNCHRONOUS, kl_clip=kl_clip).attach(sgd):
        assert_close(mine, train(other, sgd))


@pytest.mark.parametrize("graft", ["adamw", None])
def test_what_has_no_block_gets_adamws_steps_to_the_bit(graft: Any):
    model, other = small_model(), small_model()
    with optimizer_of(model, graft=graft, method="none", kl_clip=None) as optimizer:
        mine = train(model, optimizer)
    theirs = train(other, torch.optim.AdamW(other.parameters(), lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY))
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_without_a_block_sgds_graft_is_sgd():
    model, other = small_model(), small_model()
    with optimizer_of(model, graft="sgd", method="none", weight_decay=0.0) as optimizer:
        mine = train(model, optimizer)
    assert_close(mine, train(other, torch.optim.SGD(other.parameters(), lr=LR, momentum=BETAS[0])))


# Grafting a direction -------------------------------------------------------------------------------------------------


def test_a_grafted_direction_has_the_updates_norm_and_its_own_direction():
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3, 4), (5,))]
    updates = [torch.randn(each.shape, generator=generator, dtype=torch.float64) for each in gradients]
    directions = [1e9 * gradient for gradient in gradients]
    for S, U, update in zip(grafted(directions, gradients, updates)[0], directions, updates, strict=True):
        assert float(S.norm()) == pytest.approx(float(update.norm()), rel=EXACT)
        torch.testing.assert_close(S / S.norm(), U / U.norm(), rtol=EXACT, atol=EXACT)


SPOILED: dict[str, Callable[[Tensor], Tensor]] = {
    "zero": torch.zeros_like,
    "nan": lambda U: U * torch.nan,
    "one nan": lambda U: torch.where(torch.arange(U.numel()).view(U.shape) == 1, torch.nan, U),
    "infinite": lambda U: U * torch.inf,
    "uphill": torch.neg,
}


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
def test_a_direction_that_is_no_descent_is_replaced_by_the_update(spoil: Callable[[Tensor], Tensor]):
    V = torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=torch.float64)
    update = torch.tensor([[0.5, 0.1], [0.2, -0.3]], dtype=torch.float64)
    (bad, good), lengths = grafted([spoil(V), 2 * V], [V, V], [update, update])
    assert torch.equal(bad, update) and lengths.usable.tolist() == [False, True]
    assert not torch.equal(good, update)


def test_a_block_whose_inversion_failed_gets_the_grafts_update():
    """Without an inverse there is no direction; a first step along the graft's update is AdamW's."""
    model, other = small_model(), small_model()
    with optimizer_of(model, skip=("2",)) as optimizer:
        backward(model, 0)
        optimizer.precondition()
        optimizer._directions.clear()  # as if no inversion had succeeded yet
        optimizer.step()
        assert optimizer.replaced == 4
    adamw = torch.optim.AdamW(other.parameters(), lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)
    backward(other, 0)
    adamw.step()
    assert_close([p.detach() for p in model.parameters()], [p.detach() for p in other.parameters()])


def test_low_precision_parameters_are_grafted_without_overflow():
    """U = V / lambda may be larger than float16 reaches; it is made small before it is rounded."""
    V = torch.full((2, 2), 1.0, dtype=torch.float16)
    (S,), _ = grafted([torch.full((2, 2), 1e6)], [V], [0.5 * V])
    assert S.dtype == torch.float16
    torch.testing.assert_close(S, 0.5 * V)


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_lengths_are_right_where_their_squares_leave_float32s_range(size: float):
    V = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    update = torch.tensor([[0.5, 0.1], [0.2, -0.3]])
    (S, zero), lengths = grafted([size * V, torch.zeros(2)], [V, torch.ones(2)], [update, torch.ones(2)])
    assert lengths.usable.tolist() == [True, False]
    torch.testing.assert_close(S, float(update.norm() / V.norm()) * V)
    assert torch.equal(zero, torch.ones(2))


def test_a_gradient_of_float16_may_be_longer_than_float16_reaches():
    """|V| is 2.4e5; SGD's graft gives the direction that length."""
    V = torch.full((8, 8), 3e4, dtype=torch.float16)
    (S,), lengths = grafted([1e-4 * V.float()], [V], [V])
    assert lengths.usable.all()
    torch.testing.assert_close(S, V)


# A block that comes later ---------------------------------------------------------------------------------------------


def test_a_parameter_whose_block_comes_later_starts_its_average_with_its_first_step():
    model = small_model()
    with optimizer_of(model, skip=("2",), weight_decay=0.0) as optimizer:
        train(model, optimizer, 3)
        weight = model[0].weight
        del optimizer.state[weight]["momentum"]  # as AdamW leaves it
        before = weight.detach().clone()
        backward(model, 7)
        optimizer.precondition()
        direction = optimizer._directions[weight].clone()
        optimizer.step()
    moved = (before - weight.detach()) / LR
    torch.testing.assert_close(moved / moved.norm(), direction / direction.norm(), rtol=1e-9, atol=1e-9)


def test_a_parameter_that_loses_its_block_goes_on_by_adamws_full_length():
    """As a bias that is used apart, or where a state is loaded for other blocks: there is a v, and no m yet."""
    model = small_model()
    with optimizer_of(model, skip=("2",), weight_decay=0.0) as optimizer:
        train(model, optimizer, 3)
        weight = model[0].weight
        optimizer._blocked.discard(weight)
        before = weight.detach().clone()
        backward(model, 7)
        optimizer.step()
        v = optimizer.state[weight]["exp_avg_sq"] / (1 - BETAS[1] ** 4)
        assert weight.grad is not None
        expected = weight.grad / (v.sqrt() + EPS)
    assert_close([(before - weight.detach()) / LR], [expected], 1e-9)


# Around the step ------------------------------------------------------------------------------------------------------


def test_gradients_stay_as_they_are():
    model = small_model()
    with optimizer_of(model, skip=("2",)) as optimizer:
        backward(model, 0)
        before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        optimizer.step()
        assert all(
            torch.equal(a, b.grad) for a, b in zip(before, model.parameters(), strict=True) if b.grad is not None
        )


def test_a_closure_is_called_once_with_gradients_on():
    model, other = small_model(), small_model()
    calls = []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        return backward(model, 0)

    with optimizer_of(model, skip=("2",)) as optimizer, torch.no_grad():
        loss = optimizer.step(closure)
    with optimizer_of(other, skip=("2",)) as optimizer:
        expected = backward(other, 0)
        optimizer.step()
    assert calls == [True] and torch.equal(loss, expected)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_groups_have_their_own_settings_and_schedulers_change_them():
    """A group of half the learning rate moves half as far, and a scheduler's next rate is what the next step takes."""
    model = small_model()
    slow, rest = [model[0].weight], [p for p in model.parameters() if p is not model[0].weight]
    groups = [{"params": rest}, {"params": slow, "lr": LR / 2, "weight_decay": 0.0}]
    with optimizer_of(model, params=groups, skip=("2",), betas=(0.0, 0.95)) as optimizer:
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.1)
        lengths = []
        for seed in range(2):
            before = model[0].weight.detach().clone()
            backward(model, seed)
            optimizer.step()
            scheduler.step()
            lengths.append(float((model[0].weight.detach() - before).norm()))
        v = optimizer.state[model[0].weight]["exp_avg_sq"] / (1 - 0.95**2)
        assert model[0].weight.grad is not None
        update = model[0].weight.grad / (v.sqrt() + EPS)
    assert lengths[0] == pytest.approx(LR / 2 * 20**0.5, rel=1e-3)  # the first update is +-1 in all 20 places
    assert lengths[1] == pytest.approx(LR / 20 * float(update.norm()), rel=EXACT)


@pytest.mark.parametrize("graft", ["adamw", "sgd", None])
def test_a_tensor_for_a_learning_rate_is_read_at_each_step(graft: Any):
    """A scheduler changes it in place, and somebody may replace that of a group, by one of another shape too."""
    found = []
    for in_tensors in (False, True):
        model = small_model()
        rate: Any = torch.tensor(LR, dtype=torch.float64) if in_tensors else LR
        first, *rest = model.parameters()
        groups = [{"params": [first]}, {"params": rest}]
        with optimizer_of(model, graft=graft, lr=rate, params=groups, skip=("2",)) as optimizer:
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
            for seed in range(3):
                backward(model, seed)
                optimizer.step()
                scheduler.step()
            for group in optimizer.param_groups:
                assert float(group["lr"]) == LR / 8 and isinstance(group["lr"], Tensor) is in_tensors
                assert not in_tensors or group["lr"] is rate
            optimizer.param_groups[1]["lr"] = torch.tensor([LR], dtype=torch.float64) if in_tensors else LR
            found.append(train(model, optimizer, 2))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("rate", "said"),
    [
        (torch.tensor([0.1, 0.2]), r"^lr: is a tensor of shape \(2,\); one number is needed"),
        (torch.tensor(0.1, device="meta"), r"^lr: is a tensor on meta, .* keep it on the CPU, as lr\.cpu\(\)"),
        (torch.tensor(-0.5), "^lr: -0.5 is not allowed"),
        (torch.tensor(torch.nan), "^lr: nan is not allowed"),
    ],
)
def test_a_tensor_that_is_no_learning_rate_is_refused(rate: Tensor, said: str):
    model = small_model()
    with pytest.raises(ConfigError, match=said):
        optimizer_of(model, lr=rate)
    with optimizer_of(model) as optimizer, pytest.raises(ConfigError, match=said):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))], "lr": rate})


@pytest.mark.parametrize("graft", ["adamw", None])
def test_a_learning_rate_that_a_step_would_wait_for_is_refused_before_anything_is_done(graft: Any):
    model = small_model()
    first, *rest = model.parameters()
    with optimizer_of(model, graft=graft, kl_clip=None, params=[{"params": [first]}, {"params": rest}]) as optimizer:
        train(model, optimizer, 1)
        optimizer.param_groups[1]["lr"] = torch.tensor(LR, device="meta")
        before = [p.detach().clone() for p in model.parameters()]
        backward(model, 1)
        with pytest.raises(ConfigError, match="^lr: is a tensor on meta"):
            optimizer.step()
        assert optimizer.preconditioner.next_step == 1
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        optimizer.param_groups[1]["lr"] = LR
        optimizer.step()
        assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_frozen_and_tied_parameters_are_stepped_once_or_not_at_all():
    torch.manual_seed(0)
    layers = [nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False), nn.Linear(4, 3)]
    model = nn.Sequential(*layers).double()
    model[2].weight = model[0].weight
    model[3].bias.requires_grad_(False)
    frozen = model[3].bias.detach().clone()
    with optimizer_of(model) as optimizer:
        before = model[0].weight.detach().clone()
        train(model, optimizer, 1)
    assert torch.equal(model[3].bias, frozen)
    moved = (model[0].weight.detach() - (1 - LR * DECAY) * before).norm()
    assert float(moved) == pytest.approx(LR * 4, rel=1e-3)  # the first update is +-1 in all 16 places


def test_the_average_gradient_of_micro_batches_is_stepped_as_one():
    model, other = small_model(), small_model()
    x, y = rows(n=8)
    with optimizer_of(model, skip=("2",)) as optimizer:
        for half in (slice(0, 4), slice(4, 8)):
            (nn.functional.cross_entropy(model(x[half]), y[half]) / 2).backward()
        optimizer.step()
    with optimizer_of(other, skip=("2",)) as optimizer:
        nn.functional.cross_entropy(other(x), y).backward()
        optimizer.step()
    assert_close([p.detach() for p in model.parameters()], [p.detach() for p in other.parameters()], 1e-9)


def test_a_scaled_loss_gives_the_same_steps_and_an_overflow_none():
    found = []
    for enabled in (False, True):
        model = small_model()
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=enabled)
        with optimizer_of(model, skip=("2",), grad_scaler=scaler) as optimizer:
            for seed in range(3):
                x, y = rows(seed=seed)
                optimizer.zero_grad()
                scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
                scaler.step(optimizer)
                scaler.update()
            found.append([p.detach().clone() for p in model.parameters()])
            if enabled:
                scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
                model[0].weight.grad.fill_(torch.inf)
                scaler.step(optimizer)
                assert_close([p.detach() for p in model.parameters()], found[-1], 0.0)
    assert_close(found[1], found[0], 1e-10)


def test_a_preconditioners_own_step_is_refused_with_the_remedy():
    with optimizer_of(small_model(), skip=("2",)) as optimizer:
        with pytest.raises(
            kfdist.KfdistError, match=r"the Optimizer that has this Preconditioner .* leave out step\(\)"
        ):
            optimizer.preconditioner.step()


# Half of what there is ------------------------------------------------------------------------------------------------


def attention() -> nn.Module:
    torch.manual_seed(0)

    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.MultiheadAttention(4, 2, batch_first=True)
            self.out = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.inner(x[:, None], x[:, None], x[:, None], need_weights=False)[0][:, 0])

    return Attends().double()


def test_a_parameter_whose_rows_have_directions_of_two_kinds_is_stepped_by_adamw():
    model, reference = attention(), attention()
    with pytest.warns(KfdistWarning, match=r"'inner.in_proj_bias', 'inner.in_proj_weight'.* by a first-order method"):
        optimizer = optimizer_of(model, method={"inner.q_proj": "ekfac-adam", "*": "kfac-eigen"})
    with optimizer:
        backward(model, 0)
        optimizer.step()
    plain = torch.optim.AdamW(reference.parameters(), lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)
    backward(reference, 0)
    plain.step()
    mine, theirs = (each.get_parameter("inner.in_proj_weight").detach() for each in (model, reference))
    assert_close([mine], [theirs])
    assert not torch.equal(model.get_parameter("out.weight"), reference.get_parameter("out.weight"))


def test_a_closure_after_precondition_is_refused_and_an_error_leaves_no_directions():
    model = small_model()
    with optimizer_of(model) as optimizer:
        backward(model, 0)
        optimizer.precondition()
        with pytest.raises(KfdistError, match="closure after precondition"):
            optimizer.step(lambda: backward(model, 1))
        optimizer.step()
        backward(model, 1)
        optimizer.precondition()
        before = [p.detach().clone() for p in model.parameters()]
        last = list(model.parameters())[-1]
        last.grad = torch.ones_like(last).to_sparse()
        with pytest.raises(KfdistError, match="sparse"):
            optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert not optimizer._solved and not optimizer._directions

"""Which backwards and forwards belong together, and which count for nothing: K-FAC of the loss that is trained on."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kfdist.capture.capture import Capture
from tests.support.factors import Factors, armed_capture, assert_factors_equal, factors_by_definition, factors_of

EXACT = 1e-12
"""float64 sums over at most 30 rows."""

LAYERS = ["trunk", "policy", "value"]


class ActorCritic(nn.Module):
    """A trunk with two heads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.policy, self.value = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 1)
        self.double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.trunk(x))
        return self.policy(hidden), self.value(hidden)


def states(n: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def actor_loss(policy: Tensor) -> Tensor:
    return torch.log_softmax(policy, -1)[..., 0].mean()


def critic_loss(value: Tensor) -> Tensor:
    return (value - 1).square().mean()


def sum_of_both(model: nn.Module, example: Tensor) -> Tensor:
    policy, value = model(example[None])
    return actor_loss(policy) + critic_loss(value)


def truth(n: int = 6, seed: int = 0, loss: Callable[[nn.Module, Tensor], Tensor] = sum_of_both) -> Factors:
    return factors_by_definition(ActorCritic(), list(states(n, seed)), loss, LAYERS)


def both_backwards(model: nn.Module, x: Tensor, share: float = 1.0, *, keep: bool = False) -> None:
    policy, value = model(x)
    (actor_loss(policy) * share).backward(retain_graph=True)
    (critic_loss(value) * share).backward(retain_graph=keep)


# Backwards of one forward -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [False, True])
def test_backwards_of_one_forward_add_their_output_gradients(keep: bool) -> None:
    model = ActorCritic()
    capture = armed_capture(model)
    both_backwards(model, states(), keep=keep)
    drained = capture.drain()
    assert {each.examples for each in drained.values()} == {6}
    assert_factors_equal(factors_of(drained), truth(), EXACT)


def test_heads_without_a_common_layer_are_of_one_forward_too() -> None:
    class Apart(ActorCritic):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.policy(torch.tanh(self.trunk(x))), self.value(torch.cat([x, x[:, :1]], dim=1))

    model = Apart()
    expected = factors_by_definition(Apart(), list(states()), sum_of_both, LAYERS)
    capture = armed_capture(model)
    policy, value = model(states())
    actor_loss(policy).backward()
    critic_loss(value).backward()
    assert_factors_equal(factors_of(capture.drain()), expected, EXACT)


def test_layers_called_one_by_one_know_a_second_backward_by_the_graph() -> None:
    model = ActorCritic()
    capture = armed_capture(model)
    hidden = torch.tanh(model.trunk(states()))
    actor_loss(model.policy(hidden)).backward(retain_graph=True)
    critic_loss(model.value(hidden)).backward()
    assert_factors_equal(factors_of(capture.drain()), truth(), EXACT)


def test_micro_batches_of_two_backwards_each() -> None:
    model = ActorCritic()
    capture = armed_capture(model)
    for part in states().chunk(3):
        both_backwards(model, part, 1 / 3)
    assert_factors_equal(factors_of(capture.drain()), truth(), EXACT)


def test_a_graph_kept_for_nothing_changes_nothing() -> None:
    model = ActorCritic()
    capture = armed_capture(model)
    for part in states().chunk(2):
        policy, value = model(part)
        ((actor_loss(policy) + critic_loss(value)) / 2).backward(retain_graph=True)
    assert_factors_equal(factors_of(capture.drain()), truth(), EXACT)


def test_scaled_backwards_of_one_forward() -> None:
    model, amp = ActorCritic(), torch.amp.GradScaler("cpu", init_scale=1024.0)
    capture = armed_capture(model, grad_scaler=amp)
    policy, value = model(states())
    amp.scale(actor_loss(policy)).backward(retain_graph=True)
    amp.scale(critic_loss(value)).backward()
    assert_factors_equal(factors_of(capture.drain()), truth(), EXACT)


def test_with_predicted_targets_heads_may_be_observed_one_by_one() -> None:
    measured = []
    for apart in (False, True):
        model = ActorCritic()
        capture = armed_capture(model, fisher="exact")
        policy, value = model(states())
        capture.observe(policy, "cross_entropy")
        if apart:
            actor_loss(policy).backward(retain_graph=True)
        capture.observe(value, "mse")
        (critic_loss(value) if apart else actor_loss(policy) + critic_loss(value)).backward()
        drained = capture.drain()
        assert {each.examples for each in drained.values()} == {6}
        measured.append(factors_of(drained))
    assert_factors_equal(measured[1], measured[0], 0.0)


# Forwards of one backward -----------------------------------------------------------------------------------------


def siamese_loss(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> Tensor:
    """One number per pair."""
    return (left[0] * right[0]).sum(-1) + (left[1] - right[1]).square().sum(-1)


def pair_loss(model: nn.Module, pair: Tensor) -> Tensor:
    return siamese_loss(model(pair[None, 0]), model(pair[None, 1])).sum()


def test_forwards_of_one_backward_are_positions_of_the_same_examples() -> None:
    """A siamese loss, a mean over pairs: its Fisher matrix has a term per pair, and expand sums over both branches."""
    pairs = torch.stack([states(seed=1), states(seed=2)], dim=1)
    expected = factors_by_definition(ActorCritic(), list(pairs), pair_loss, LAYERS)
    model = ActorCritic()
    capture = armed_capture(model)
    siamese_loss(model(pairs[:, 0]), model(pairs[:, 1])).mean().backward()
    drained = capture.drain()
    assert {each.examples for each in drained.values()} == {6}
    assert_factors_equal(factors_of(drained), expected, EXACT)


def test_a_layer_called_twice_by_itself_is_no_different_from_twice_in_one_forward() -> None:
    pairs = torch.stack([states(seed=1), states(seed=2)], dim=1)

    def loss(model: Any, pair: Tensor) -> Tensor:
        return (model.trunk(pair[None, 0]) * model.trunk(pair[None, 1])).sum()

    expected = factors_by_definition(ActorCritic(), list(pairs), loss, ["trunk"])
    model = ActorCritic()
    capture = armed_capture(model)
    (model.trunk(pairs[:, 0]) * model.trunk(pairs[:, 1])).sum(-1).mean().backward()
    assert_factors_equal(factors_of(capture.drain()), expected, EXACT)


def test_means_over_forwards_of_different_size_add_up_as_fisher_matrices_do() -> None:
    """(A1 + A2) (x) (G1 + G2) / 2, the expand form of F1 + F2."""
    of_both = [truth(2, 1), truth(6, 2)]
    expected = {
        name: (of_both[0][name][0] + of_both[1][name][0], (of_both[0][name][1] + of_both[1][name][1]) / 2)
        for name in LAYERS
    }
    model = ActorCritic()
    capture = armed_capture(model)
    losses = [actor_loss(p) + critic_loss(v) for p, v in (model(states(2, 1)), model(states(6, 2)))]
    torch.stack(losses).sum().backward()
    assert_factors_equal(factors_of(capture.drain()), expected, EXACT)


def test_a_second_backward_over_an_old_and_a_new_forward_is_of_the_same_micro_batch() -> None:
    pairs = torch.stack([states(seed=1), states(seed=2)], dim=1)

    def loss(model: nn.Module, pair: Tensor) -> Tensor:
        first = model(pair[None, 0])
        return actor_loss(first[0]) + siamese_loss(first, model(pair[None, 1])).sum()

    expected = factors_by_definition(ActorCritic(), list(pairs), loss, LAYERS)
    model = ActorCritic()
    capture = armed_capture(model)
    first = model(pairs[:, 0])
    actor_loss(first[0]).backward(retain_graph=True)
    siamese_loss(first, model(pairs[:, 1])).mean().backward()
    assert_factors_equal(factors_of(capture.drain()), expected, EXACT)


# Backwards that count for nothing ---------------------------------------------------------------------------------


def step_of(model: nn.Module, n: int = 6, seed: int = 0) -> None:
    policy, value = model(states(n, seed))
    (actor_loss(policy) + critic_loss(value)).backward()


def out_of_memory(model: Any) -> None:
    """A backward that fails half way."""

    def fails(_: Tensor) -> None:
        raise torch.OutOfMemoryError

    hidden = torch.tanh(model.trunk(states(5, 9)))
    policy, value = model.policy(hidden), model.value(hidden)
    hidden.register_hook(fails)
    with pytest.raises(torch.OutOfMemoryError):
        (actor_loss(policy) + critic_loss(value)).backward()


def failed_forward(model: nn.Module) -> None:
    with pytest.raises(RuntimeError):
        model(states().float())


def clipped(model: nn.Module) -> None:
    step_of(model, 5, 9)
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)


WASTED: dict[str, Callable[[nn.Module], None]] = {
    "a spike": lambda model: step_of(model, 5, 9),
    "a clipped one": clipped,
    "two of one forward": lambda model: both_backwards(model, states(5, 9)),
    "a kept graph": lambda model: both_backwards(model, states(5, 9), keep=True),
    "out of memory": out_of_memory,
    "a failed forward": failed_forward,
}


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("wasted", WASTED)
@pytest.mark.parametrize("stale", [False, True])
def test_a_backward_whose_gradients_are_dropped_counts_for_nothing(wasted: str, set_to_none: bool, stale: bool) -> None:
    model = ActorCritic()
    capture = armed_capture(model)
    if stale:  # gradients of the step before, dropped before this one's first backward
        step_of(model)
        capture.drain()
        model.zero_grad(set_to_none)
    for _ in range(2):
        WASTED[wasted](model)
        model.zero_grad(set_to_none)
    for part in states().chunk(2):
        policy, value = model(part)
        ((actor_loss(policy) + critic_loss(value)) / 2).backward()
    assert_factors_equal(factors_of(capture.drain()), truth(), EXACT)


@pytest.mark.parametrize("between", [lambda _: None, lambda model: nn.utils.clip_grad_norm_(model.parameters(), 1e-3)])
def test_gradients_that_are_still_there_count(between: Callable[[nn.Module], None]) -> None:
    model = ActorCritic()
    capture = armed_capture(model)
    for part in states().chunk(3):
        policy, value = model(part)
        ((actor_loss(policy) + critic_loss(value)) / 3).backward()
        between(model)
    assert_factors_equal(factors_of(capture.drain()), truth(), EXACT)


@pytest.mark.parametrize("dropped", [False, True])
def test_sparse_gradients_that_were_changed_are_read(dropped: bool) -> None:
    model = nn.Embedding(5, 3, sparse=True)
    capture = armed_capture(model, sums=frozenset({"A_diagonal", "G"}))
    for numbers in torch.arange(8).view(2, 4) % 5:
        model(numbers).square().sum().backward()
        assert model.weight.grad is not None
        if dropped:
            model.zero_grad(set_to_none=False)
        else:
            model.weight.grad.mul_(0.5)
    model(torch.arange(4)).square().sum().backward()
    assert capture.drain()[""].examples == (4 if dropped else 12)


def test_gradients_that_never_stay_in_grad_count() -> None:
    """Megatron's loops move them to buffers of their own inside of the backward."""
    model = ActorCritic()
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda each: setattr(each, "grad", None))
    capture = armed_capture(model)
    for part in states().chunk(3):
        policy, value = model(part)
        ((actor_loss(policy) + critic_loss(value)) / 3).backward()
    assert_factors_equal(factors_of(capture.drain()), truth(), EXACT)


def test_the_gradients_of_some_blocks_alone_say_nothing() -> None:
    """A head without a target in this batch: its gradient is absent, the others' are there."""
    model = ActorCritic()
    capture = armed_capture(model)
    for part in states().chunk(2):
        policy, value = model(part)
        ((actor_loss(policy) + critic_loss(value)) / 2).backward()
        model.value.zero_grad()
    assert_factors_equal(factors_of(capture.drain()), truth(), EXACT)


def test_discard_says_what_no_gradient_shows() -> None:
    model = ActorCritic()
    capture = armed_capture(model)
    both_backwards(model, states(5, 9), keep=True)
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.grad.data.zero_()  # which autograd isn't told
    capture.discard()
    step_of(model)
    assert_factors_equal(factors_of(capture.drain()), truth(), EXACT)


def observed_step(model: nn.Module, capture: Capture, n: int, seed: int, *, late: bool) -> None:
    if not late:
        model.zero_grad()
    policy, value = model(states(n, seed))
    capture.observe(policy, "cross_entropy")
    capture.observe(value, "mse")
    (actor_loss(policy) + critic_loss(value)).backward()
    if late:
        model.zero_grad()


@pytest.mark.parametrize("late", [False, True])
def test_what_was_observed_before_a_backward_that_was_dropped_goes_with_it(late: bool) -> None:
    measured = []
    for wasted in (0, 2):
        model = ActorCritic()
        capture = armed_capture(model, fisher="exact")
        for seed in range(wasted):
            observed_step(model, capture, 5, 8 + seed, late=late)
        observed_step(model, capture, 6, 0, late=False)
        measured.append(factors_of(capture.drain()))
    assert_factors_equal(measured[1], measured[0], EXACT)

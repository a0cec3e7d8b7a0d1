"""`kfdist.Optimizer` where layers are frozen and thawed while it trains, as torch's optimizers take it."""

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfdist
from kfdist.curvature.references import dense_kronecker, solve_dense
from kfdist.errors import CheckpointError, KfdistWarning, ModelChanged
from tests.support.optimizing import backward, small_model
from tests.support.preconditioning import backward as backward_of
from tests.support.preconditioning import factors, preconditioner, two_layers
from tests.support.tiers import in_turn

EXACT = 1e-10
"""float64; at a damping of 0.1 the dense problem's condition number is below 1e4."""

OWN: dict[str, Any] = {"adoption": kfdist.FixedLag(1), "factor_period": 2, "inverse_period": 2}
WAYS: dict[str, dict[str, Any]] = {
    "default": {"adoption": kfdist.FixedLag(1)},
    "ekfac-adam": {**OWN, "skip": ("2",)},
    "with norms": {**OWN, "method": "ekfac-adam"},
    "kfac-eigen": {**OWN, "method": "kfac-eigen"},
    "kfac-eigen on sgd": {**OWN, "method": "kfac-eigen", "graft": "sgd"},
    "b-kfac": {**OWN, "method": "b-kfac"},
    "soap": {**OWN, "method": "soap"},
    "shampoo": {**OWN, "method": "shampoo"},
}


def optimizer_of(model: nn.Module, way: str, **changes: Any) -> kfdist.Optimizer:
    return kfdist.Optimizer(model, lr=0.02, **{**WAYS[way], **changes})


def steps(
    model: nn.Module, optimizer: torch.optim.Optimizer, seeds: Sequence[int], after: Callable[[], Any] = lambda: None
) -> None:
    """Some steps, with what is done between backward and step."""
    for seed in seeds:
        backward(model, seed)
        after()
        optimizer.step()


def copies(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def assert_equal(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.fixture(autouse=True)
def nothing_is_said():
    """Freezing gives no reason to warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", KfdistWarning)
        yield


@pytest.mark.parametrize(("way", "layer"), in_turn(WAYS, [0, 2, 3], of=2))
def test_a_frozen_layer_stays_and_the_others_go_on_as_if_its_gradient_were_dropped(way: str, layer: int) -> None:
    found = []
    for drops in (False, True):
        model = small_model()

        def drop(model: nn.Sequential = model) -> None:
            for p in model[layer].parameters():
                p.grad = None

        with optimizer_of(model, way) as optimizer:
            steps(model, optimizer, range(4))
            before = copies(model[layer])
            model[layer].requires_grad_(drops)
            steps(model, optimizer, range(4, 12), drop if drops else lambda: None)
            assert_equal(copies(model[layer]), before)
        found.append(copies(model))
    assert_equal(*found)


@pytest.mark.parametrize("way", WAYS)
def test_a_frozen_blocks_statistics_and_moments_stay_and_go_on_when_it_is_thawed(way: str) -> None:
    model = small_model()
    with optimizer_of(model, way, ema_decay=0.5) as optimizer:
        steps(model, optimizer, range(5))
        model[0].requires_grad_(False)
        steps(model, optimizer, range(5, 9))  # inverses of before are in use
        before = copy.deepcopy(optimizer.state_dict())
        steps(model, optimizer, [step % 7 for step in range(400 if way == "default" else 40)])  # its periods are longer
        after = optimizer.state_dict()
        for kind in ("sums", "moments"):
            stored = after["preconditioner"].get(kind, {})
            for name in [each for each in stored if each == "0" or each.startswith("0.")]:
                for key, each in stored[name].items():
                    assert torch.equal(each, before["preconditioner"][kind][name][key]), (kind, name, key)
        for name, memory in after["preconditioner"]["memories"].items():
            if way != "soap" and (name == "0" or name.startswith("0.")):  # whose basis is turned on at each inversion
                torch.testing.assert_close(memory["kept"], before["preconditioner"]["memories"][name]["kept"])
        assert str(after["state"].get(0)) == str(before["state"].get(0))
        model[0].requires_grad_(True)
        kept = copies(model[0])
        steps(model, optimizer, range(6))
        assert all((a - b).abs().max() > 1e-3 for a, b in zip(copies(model[0]), kept, strict=True))
        assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("way", WAYS)
def test_what_is_frozen_before_the_first_step_gets_its_inverse_once_it_is_thawed(way: str) -> None:
    model = small_model()
    with optimizer_of(model, way) as optimizer:
        model[0].requires_grad_(False)
        before = copies(model[0])
        steps(model, optimizer, range(25))
        pre = optimizer.preconditioner
        mine = {name for name in pre.versions() if name == "0" or name.startswith("0.")}
        others = pre.versions().keys() - mine
        assert mine and others and mine.isdisjoint(pre.inverses()) and others <= pre.inverses().keys()
        assert_equal(copies(model[0]), before)
        model[0].requires_grad_(True)
        steps(model, optimizer, range(25, 50))
        assert all(25 <= pre.versions()[name] < 50 for name in mine) and mine <= pre.inverses().keys()
        assert not any(torch.equal(a, b) for a, b in zip(copies(model[0]), before, strict=True))


@pytest.mark.parametrize("way", WAYS)
def test_a_run_resumed_while_a_layer_is_frozen_goes_on_bit_for_bit(way: str) -> None:
    def go_on(model: nn.Sequential, optimizer: kfdist.Optimizer) -> list[Tensor]:
        steps(model, optimizer, range(6, 9))
        model[0].requires_grad_(True)
        steps(model, optimizer, range(9, 14))
        return copies(model)

    model = small_model()
    with optimizer_of(model, way) as optimizer:
        steps(model, optimizer, range(3))
        model[0].requires_grad_(False)
        steps(model, optimizer, range(3, 6))
        saved = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
        expected = go_on(model, optimizer)
    other = small_model()
    other.load_state_dict(saved["model"])
    with optimizer_of(other, way) as optimizer:
        other[0].requires_grad_(False)
        optimizer.load_state_dict(saved["optimizer"])
        assert_equal(go_on(other, optimizer), expected)


class Attending(nn.Module):
    """Projections in parameters of their own, that have one bias, between layers of which two have one weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(4, 4)
        self.twin = nn.Linear(4, 4)
        self.twin.weight = self.inner.weight
        self.attention = nn.MultiheadAttention(4, 2, kdim=3, vdim=3, batch_first=True)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twin(self.inner(x).tanh()).unsqueeze(1)
        return self.head(self.norm(self.attention(x, x[..., :3], x[..., 1:])[0])).squeeze(1)


PARTS = [
    "head.weight",
    "head.bias",
    "twin.bias",
    "inner.weight",
    "norm.weight",
    "norm.bias",
    "attention.in_proj_bias",
    "attention.v_proj_weight",
]


@pytest.mark.parametrize(
    ("way", "part"), in_turn(["default", "with norms", "kfac-eigen", "b-kfac", "soap"], PARTS, of=4)
)
def test_a_part_of_a_layer_is_frozen_while_the_rest_is_trained(way: str, part: str) -> None:
    model = Attending().double()
    frozen = model.get_parameter(part)
    with optimizer_of(model, way, **({"skip": ()} if way == "b-kfac" else {})) as optimizer:
        steps(model, optimizer, range(4))
        frozen.requires_grad_(False)
        kept = frozen.detach().clone()
        for seeds, thawed in ((range(4, 8), False), (range(8, 12), True)):
            before = copies(model)
            frozen.requires_grad_(thawed)
            steps(model, optimizer, seeds)
            for (name, p), old in zip(model.named_parameters(), before, strict=True):
                assert p.isfinite().all()
                assert torch.equal(p, old) is (name == part and not thawed), name
            assert torch.equal(frozen, kept) is not thawed


@pytest.mark.parametrize("part", ["weight", "bias"])
@pytest.mark.parametrize("into", [False, True])
def test_what_is_frozen_beside_the_rest_counts_as_a_gradient_of_zero(part: str, into: bool) -> None:
    model = two_layers()
    with preconditioner(model, kl_clip=None) as pre:
        backward_of(model)
        pre.step()
        model.zero_grad()
        getattr(model[0], part).requires_grad_(False)
        backward_of(model, seed=1)
        V = torch.zeros(1, 5, 5, dtype=torch.float64)
        rest = "bias" if part == "weight" else "weight"
        here = (..., -1) if rest == "bias" else (..., slice(4))
        V[here] = getattr(model[0], rest).grad
        if into:
            A, G = factors(pre)["0"]
            found = pre.directions(0.1)
            assert model.get_parameter(f"0.{part}") not in found
            direction = found[model.get_parameter(f"0.{rest}")]
        else:
            pre.step()
            A, G = factors(pre)["0"]
            assert getattr(model[0], part).grad is None
            direction = getattr(model[0], rest).grad
        expected = solve_dense(dense_kronecker(A, G), 0.1, V)[here].reshape(direction.shape)
        torch.testing.assert_close(direction, expected, rtol=EXACT, atol=EXACT)


def test_a_layer_frozen_from_the_start_and_thawed_later_is_adamws_with_the_right_advice() -> None:
    model, other = small_model(), small_model()
    for each in (model, other):
        each[0].requires_grad_(False)
    adamw = torch.optim.AdamW(other[0].parameters(), lr=0.02, weight_decay=0.01)
    with optimizer_of(model, "default") as optimizer:
        steps(model, optimizer, range(3))
        model[0].requires_grad_(True)
        with pytest.warns(KfdistWarning, match="has no block: freeze layers after that") as said:
            for seed in range(3, 15):
                backward(model, seed)
                for p, q in zip(model[0].parameters(), other[0].parameters(), strict=True):
                    assert p.grad is not None
                    q.grad = p.grad.clone()
                optimizer.step()
                adamw.step()
        assert len(said) == 1
        assert_equal(copies(model[0]), copies(other[0]))
        saved = copy.deepcopy(optimizer.state_dict())
    with optimizer_of(model, "default") as optimizer:  # a new one has its blocks, and begins its statistics anew
        with pytest.raises(CheckpointError, match=r"lacks \['0'\].*freeze layers .* only after that"):
            optimizer.load_state_dict(saved)
        optimizer.load_state_dict({key: each for key, each in saved.items() if key != "preconditioner"})
        assert {block.name for group in optimizer.preconditioner.groups for block in group.blocks} == {"0", "3"}
        steps(model, optimizer, range(3))


def test_a_bias_frozen_from_the_start_and_thawed_later_is_adamws_beside_its_weights_block() -> None:
    model = small_model()
    bias = model.get_parameter("0.bias")
    bias.requires_grad_(False)
    other = nn.Parameter(bias.detach().clone())
    adamw = torch.optim.AdamW([other], lr=0.02, weight_decay=0.01)
    with optimizer_of(model, "default", factor_period=2, inverse_period=4) as optimizer:
        steps(model, optimizer, range(5))
        assert torch.equal(bias, other)
        bias.requires_grad_(True)
        with pytest.warns(KfdistWarning, match=r"1 parameters have .*: '0\.bias': it was frozen.* first-order method"):
            for seed in range(5, 12):
                backward(model, seed)
                assert bias.grad is not None
                other.grad = bias.grad.clone()
                optimizer.precondition()
                assert bias not in optimizer._directions and model.get_parameter("0.weight") in optimizer._directions
                optimizer.step()
                adamw.step()
        assert torch.equal(bias, other)


def test_a_new_head_is_refused_and_a_new_optimizer_has_it() -> None:
    model = small_model()
    with optimizer_of(model, "default") as optimizer:
        steps(model, optimizer, range(3))
        model[3] = nn.Linear(5, 3).double()
        backward(model, 3)
        with pytest.raises(ModelChanged, match="layer '3' was replaced .* close that, and make a new Preconditioner"):
            optimizer.step()
        optimizer.close()
    with optimizer_of(model, "default") as optimizer:
        before = copies(model)
        steps(model, optimizer, range(3))
        assert not any(torch.equal(a, b) for a, b in zip(copies(model), before, strict=True))


@pytest.mark.parametrize("way", WAYS)
def test_a_converted_model_is_refused_before_anything_moves(way: str) -> None:
    model = small_model()
    with optimizer_of(model, way) as optimizer:
        steps(model, optimizer, range(3))
        model.float()  # gradients with it
        before = copies(model)
        with pytest.raises(ModelChanged, match="was converted from torch.float64 to torch.float32 after"):
            optimizer.step()
        assert_equal(copies(model), before)


def test_a_compiled_model_is_trained_alike() -> None:
    found = []
    for compiles in (False, True):
        model = small_model()
        whole: Any = torch.compile(model, backend="eager") if compiles else model
        with optimizer_of(whole, "default", factor_period=2, inverse_period=4) as optimizer:
            for trained in (True, False, True):
                model[0].requires_grad_(trained)
                steps(whole, optimizer, range(5))
        found.append(copies(model))
    assert_equal(*found)

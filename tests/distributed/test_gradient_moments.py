"""Moments of gradients are kept by each group's courier rank alone, and nothing of them is reduced."""

from typing import Any

import torch
from torch import Tensor, nn

import kfdist
from kfdist.comm.communicator import Communicator
from kfdist.comm.reduce import GradientReducer
from kfdist.errors import CheckpointError
from tests.support.ranks import run_ranks


def pair_and_state(communicator: Communicator, *, fold: bool) -> tuple[nn.Module, dict[str, Any]]:
    """Trains one step; the state is rank 0's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    with shampoo_of(model) as pre:
        model(torch.ones(4, 6)).square().mean().backward()
        pre.step()
        if fold:
            pre.fold()
        states: list[Any] = [pre.state_dict()]
    torch.distributed.broadcast_object_list(states, 0)
    return model, states[0]


def shampoo_of(model: nn.Module) -> kfdist.Preconditioner:
    return kfdist.Preconditioner(
        model, "shampoo", factor_period=1, inverse_period=1, kl_clip=None, adoption=kfdist.FixedLag(0)
    )


def loads_of_rank_0s_state(communicator: Communicator) -> dict[bool, str | dict[str, dict[str, Tensor]]]:
    found: dict[bool, Any] = {}
    for fold in (False, True):
        model, state = pair_and_state(communicator, fold=fold)
        with shampoo_of(model) as pre:
            try:
                pre.check_state(state)
            except CheckpointError as error:
                found[fold] = str(error)
                continue
            pre.load_state_dict(state)
            found[fold] = pre.state_dict()["moments"]
    return found


def test_rank_0s_state_is_for_all_after_fold_alone() -> None:
    first, second = run_ranks(2, loads_of_rank_0s_state)
    (lost,) = second[True]
    assert f"lacks the gradients' moments of ['{lost}']" in second[False] and "fold()" in second[False]
    assert lost not in first[False] and lost not in first[True]
    assert float(second[True][lost]["weight"]) > 0


def sums_of(communicator: Communicator) -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    reducer = GradientReducer(list(model.parameters()), communicator)
    pre = kfdist.Preconditioner(
        model, "shampoo", factor_period=1, inverse_period=2, kl_clip=None, adoption=kfdist.FixedLag(0), digest_period=1
    )
    for step in range(5):
        model.zero_grad()
        generator = torch.Generator().manual_seed(10 * step + communicator.rank)
        model(torch.randn(4, 6, generator=generator, dtype=torch.float64)).square().mean().backward()
        reducer.reduce()
        pre.step()  # compares the ranks' parameters
    own = set(pre.pipeline.reducer.moments.sums)
    measured = pre.pipeline.reducer.bytes_sent
    before = pre.state_dict()["moments"]
    pre.fold()
    shared = pre.state_dict()["moments"]
    directions = pre.directions(1.0)
    pre.close()
    reducer.close()
    return {
        "own": own,
        "measured": measured,
        "before": before,
        "shared": shared,
        "directions": [directions[p] for p in model.parameters() if p in directions],
    }


def test_each_rank_has_its_own_and_after_fold_all() -> None:
    first, second = run_ranks(2, sums_of)
    assert first["own"] and second["own"] and not first["own"] & second["own"]
    assert first["own"] | second["own"] == {"0.weight", "2.weight", "4.weight"}
    assert first["measured"] == second["measured"] == 0
    whole = {**first["before"], **second["before"]}
    for rank in (first, second):
        assert set(rank["before"]) == rank["own"] and set(rank["shared"]) == set(whole)
        for block, state in whole.items():
            assert all(torch.equal(rank["shared"][block][name], tensor) for name, tensor in state.items())
    assert all(map(torch.equal, first["directions"], second["directions"]))

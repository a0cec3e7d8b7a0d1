"""Equivalence 11: the same training over any number of ranks with equal data, and in a single process."""

import functools
from typing import Any

import torch
from torch import Tensor, nn

import kfdist
from kfdist.comm.communicator import Communicator
from kfdist.comm.reduce import GradientReducer
from kfdist.curvature.inverters import make_inverter
from tests.acceptance.problems import Problem, wide_batch, wide_mlp
from tests.acceptance.ways import Directions, Way
from tests.support.ranks import run_ranks

STEPS = 3

ROOM = {"rank": 6, "increment_rows": 8}
"""Two ranks' rows of 4 examples, and few enough eigenpairs for Brand's update in factors of 16 to 18."""

CONVERGED = {"tolerance": 1e-14, "max_iterations": 300}

STRATEGIES: dict[str, tuple[str, dict[str, Any]]] = {
    "kfac": ("kfac", {}),
    "kfac-eigen": ("kfac-eigen", {}),
    "kfac-tridiagonal": ("kfac-tridiagonal", {}),
    "two-level": ("two-level", {}),
    "ekfac": ("ekfac", {}),
    "ekfac-adam": ("ekfac-adam", {}),
    "rs-kfac": ("rs-kfac", {"rank": 6, "oversampling": 3}),
    "sre-kfac": ("sre-kfac", {"rank": 6, "oversampling": 3}),
    "b-kfac": ("b-kfac", ROOM),
    "b-r-kfac": ("b-r-kfac", ROOM),
    "b-kfac-c": ("b-kfac-c", ROOM),
    "cg-fac solved everywhere": ("cg-fac", CONVERGED),
    "cg-fac solved by the owner": ("cg-fac", {**CONVERGED, "operator": "block", "solve": "owner"}),
    "seng global": ("seng", {}),
    "seng local-average": ("seng", {"aggregate": "local-average"}),
    "eva": ("eva", {}),
}
"""Who inverts what, from whose statistics: every method, and every way of its own to be distributed."""


def train(communicator: Communicator, strategy: str) -> Directions:
    """Trains for a few steps, each rank on the same batches; returns the parameters."""
    method, settings = STRATEGIES[strategy]
    model = wide_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reducer = GradientReducer(list(model.parameters()), communicator, bucket_bytes=2000)
    pre = kfdist.Preconditioner(
        model,
        make_inverter(method, **settings),
        damping=0.1,
        factor_period=1,
        inverse_period=2,
        kl_clip=1e-2,
        lr=0.1,
        adoption=kfdist.FixedLag(0),
    )
    for step in range(STEPS):
        x, y = wide_batch(seed=step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        reducer.reduce()
        pre.step()
        optimizer.step()
    pre.close()
    reducer.close()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def train_all(communicator: Communicator) -> dict[str, Directions]:
    """Trains by every strategy, one after another."""
    return {strategy: train(communicator, strategy) for strategy in STRATEGIES}


@functools.cache
def _world(size: int) -> list[dict[str, Directions]]:
    return [train_all(Communicator(None))] if size == 0 else run_ranks(size, train_all)


def untrained() -> dict[str, Tensor]:
    """The parameters before the first step."""
    return {name: parameter.detach() for name, parameter in wide_mlp().named_parameters()}


def single_process(strategy: str) -> Way:
    """The parameters that one process without any process group trains."""

    def way(problem: Problem) -> Directions:
        del problem
        found = _world(0)[0][strategy]
        assert all(not torch.equal(found[name], before) for name, before in untrained().items())
        return found

    return way


def world_of(size: int, strategy: str, *, rank: int = 0) -> Way:
    """The parameters that one of so many ranks has after training on equal batches."""

    def way(problem: Problem) -> Directions:
        del problem
        return _world(size)[rank][strategy]

    return way

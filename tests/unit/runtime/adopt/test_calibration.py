"""Memories that the ranks measure: overwritten when a snapshot comes into use, averaged after, summed over ranks."""

from typing import Any

import torch
from torch import nn

from kfdist.curvature.inverters.ekfac import EkfacBasis
from kfdist.curvature.jobs import encode_result
from kfdist.curvature.statistics import Samples
from kfdist.runtime.adopt.calibration import calibrate
from kfdist.runtime.adopt.snapshots import SnapshotInstaller
from kfdist.runtime.counters import PipelineCounters
from kfdist.runtime.track import Track
from tests.support.lockstep import in_lockstep
from tests.support.plans import planned
from tests.support.preconditioning import backward, preconditioner, two_layers
from tests.support.samples import make_samples

DECAY = 0.6
NAME = ""


def ekfac_track() -> tuple[Track, SnapshotInstaller]:
    """The only group of a linear layer, and what takes its snapshots into use."""
    (group,) = planned(nn.Linear(4, 3).double(), "ekfac").groups
    return Track.of(group, queued=False), SnapshotInstaller(torch.device("cpu"), PipelineCounters(), warns=False)


def basis(seed: int) -> EkfacBasis:
    generator = torch.Generator().manual_seed(seed)
    Q_A, Q_G = (torch.linalg.qr(torch.randn(1, d, d, generator=generator, dtype=torch.float64)).Q for d in (5, 3))
    ones = torch.ones(1, dtype=torch.float64)
    return EkfacBasis(trace_A=ones, trace_G=ones, Q_A=Q_A, Q_G=Q_G)


def samples(seed: int, weight: list[float] | None = None) -> Samples:
    return make_samples(n=4, p=3, q=5, c=1, seed=seed, weight=weight)


def measured(in_use: EkfacBasis, of_ranks: list[Samples]) -> torch.Tensor:
    """Sums weight_i (Q_G^T S_i Q_A)^2 densely."""
    total = torch.zeros(1, 3, 5, dtype=torch.float64)
    for each in of_ranks:
        S = (each.g.mT @ each.a).transpose(0, 1)
        total += ((in_use.Q_G.mT @ S @ in_use.Q_A).square() * each.weight[:, None, None, None]).sum(0)
    return total


def test_the_first_folding_overwrites_the_others_average_and_a_new_basis_starts_afresh() -> None:
    batches = [[samples(3 * step), samples(3 * step + 1)] for step in range(5)]

    def run(communicator: Any) -> list[dict[str, torch.Tensor]]:
        track, installer = ekfac_track()
        memories = []
        for step in range(5):
            if step in (0, 3):
                installer.install(track, step, encode_result({NAME: basis(step)}))
                assert track.memories[NAME].kept == {}
                assert track.calibrations == 0
            mine = {NAME: batches[step][communicator.rank]}
            sent = calibrate([track], mine, communicator, ema_decay=DECAY)
            assert sent == 8 * (15 + 1)
            memories.append({key: tensor.clone() for key, tensor in track.memories[NAME].kept.items()})
        assert calibrate([], {}, communicator, ema_decay=DECAY) == 0
        return memories

    def truth(basis_of: int, weights: dict[int, float]) -> torch.Tensor:
        return sum(
            (weight * measured(basis(basis_of), batches[step]) for step, weight in weights.items()),
            torch.zeros(1, 3, 5, dtype=torch.float64),
        )

    for memories in in_lockstep(2, run):
        expected = [
            truth(0, {0: 1.0}),
            truth(0, {0: 0.5, 1: 0.5}),
            truth(0, {0: 0.3, 1: 0.3, 2: 0.4}),  # rho_3 = min(2/3, 0.6)
            truth(3, {3: 1.0}),
            truth(3, {3: 0.5, 4: 0.5}),
        ]
        for found, scales in zip(memories, expected, strict=True):
            torch.testing.assert_close(found["scales"], scales, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(found["examples"], torch.tensor(8.0, dtype=torch.float64))


def test_batches_that_count_for_nothing_leave_the_scales_what_they_are() -> None:
    def run(communicator: Any) -> None:
        track, installer = ekfac_track()
        installer.install(track, 0, encode_result({NAME: basis(0)}))
        quotients = []
        for weight in (None, [0.0] * 4, None):
            calibrate([track], {NAME: samples(1, weight)}, communicator, ema_decay=DECAY)
            quotients.append(track.memories[NAME].kept["scales"] / track.memories[NAME].kept["examples"])
        torch.testing.assert_close(quotients[1], quotients[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(quotients[2], quotients[0], rtol=1e-12, atol=1e-12)

    in_lockstep(1, run)


def test_groups_without_a_snapshot_are_left_alone() -> None:
    track, _ = ekfac_track()
    (sent,) = in_lockstep(1, lambda each: calibrate([track], {}, each, ema_decay=DECAY))
    assert (sent, track.memories[NAME].kept) == (0, {})


def test_where_nothing_was_measured_the_ranks_own_snapshots_stay_in_use() -> None:
    """CG-FAC at a step whose batch is not finite: the rows in use stay, from the step before."""
    model = two_layers()
    pre = preconditioner(model, "cg-fac", kl_clip=None)

    def step(*, spoiled: bool, seed: int = 0) -> list[torch.Tensor]:
        model.zero_grad()
        if spoiled:
            model(torch.full((8, 4), torch.nan, dtype=torch.float64)).sum().backward()
        else:
            backward(model, seed=seed)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        pre.step()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    bare = step(spoiled=True)
    assert all(bool((direction == 1).all()) for direction in bare), "nothing was ever measured"
    good = step(spoiled=False)
    rows = pre.inverses()
    kept = step(spoiled=True)
    assert all(map(torch.equal, good, kept))
    assert set(pre.versions().values()) == {2}
    for name, after in pre.inverses().items():
        assert torch.equal(rows[name].trace_A, after.trace_A)
    changed = step(spoiled=False, seed=5)
    # Of ones for all classes, whose gradients sum to zero, the second layer has no curvature: 1 / damping always.
    assert not any(map(torch.equal, good[:2], changed[:2]))
    pre.close()

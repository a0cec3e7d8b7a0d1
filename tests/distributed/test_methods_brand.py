"""Brand's updates over ranks: every increment is applied once and in order, whatever dies, lags or is merged."""

import copy
import hashlib
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfdist
from kfdist.comm.communicator import Communicator
from kfdist.comm.reduce import GradientReducer
from kfdist.curvature.averages import means
from kfdist.curvature.inverters import make_inverter
from kfdist.curvature.jobs import decode_result
from kfdist.linalg.psd import unpack_triangle
from tests.support.controller import ControllerThread
from tests.support.faults import EACH, Faults
from tests.support.faulty.link import FaultyLink
from tests.support.owners import OwnerProcess
from tests.support.ranks import run_ranks
from tests.support.small_models import images

# An owner killed between two updates ----------------------------------------------------------------------------------

RANKS, STEPS, LAG = 4, 8, 3
KILLED_AFTER = 3


def train(communicator: Communicator, address: str | None, folder: Path | None) -> tuple[str, list[str]]:
    """Trains with updates at every step; returns a digest of parameters and snapshots, and why jobs went out again.

    With a folder, rank 0 says there that the jobs of a step were shipped, and goes on when the owner was killed.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 16), nn.Tanh(), nn.Linear(16, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    reducer = GradientReducer(list(model.parameters()), communicator)
    pre = kfdist.Preconditioner(
        model,
        make_inverter("b-kfac", rank=4, increment_rows=8),
        damping=0.1,
        factor_period=1,
        inverse_period=4,
        kl_clip=1e-2,
        lr=0.05,
        adoption=kfdist.FixedLag(LAG),
        link=kfdist.connect(address, run="brand", deadline_seconds=30) if address else None,
        digest_period=1,
    )
    assert "Brand on A and G" in str(pre.coverage())
    for step in range(STEPS):
        x, y = images(2, seed=100 * step + communicator.rank, dtype=torch.float32)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        reducer.reduce()
        pre.step()
        optimizer.step()
        if folder is not None and communicator.rank == 0 and step == KILLED_AFTER:
            (folder / "shipped").touch()
            wait_for(folder / "killed")
    assert set(pre.versions().values()) == {STEPS - 1 - LAG}
    snapshots = pre.state_dict()["snapshots"]
    digest = hashlib.sha256(b"".join(parameter.detach().numpy().tobytes() for parameter in model.parameters()))
    for group in pre.groups:
        digest.update(snapshots[group.name]["payload"])
    reasons = list(pre.counters()["resubmissions"])
    assert not pre.counters()["failures"]
    pre.close()
    reducer.close()
    return digest.hexdigest(), reasons


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} never came"
        time.sleep(0.01)


@pytest.mark.slow
def test_an_owner_killed_between_two_updates_changes_no_bit(tmp_path: Path, faults: Faults) -> None:
    undisturbed = run_ranks(RANKS, train, None, None)
    faults.at(inversion=EACH).delay(0.2)

    def kill(owner: OwnerProcess) -> None:
        wait_for(tmp_path / "shipped")
        owner.kill()
        owner.start()
        (tmp_path / "killed").touch()

    with (
        ControllerThread(tmp_path / "state.sqlite") as controller,
        OwnerProcess("owner-0", folder=tmp_path, controller=controller.address) as owner,
    ):
        killer = threading.Thread(target=kill, args=(owner,), daemon=True)
        killer.start()
        disturbed = run_ranks(RANKS, train, controller.address, tmp_path)
        killer.join(10)
    assert len({digest for digest, _ in [*undisturbed, *disturbed]}) == 1
    assert {reason for _, reasons in disturbed for reason in reasons}, "no job went out again"


# Jobs merged behind a slow link ---------------------------------------------------------------------------------------

UPDATES = 11


def behind_a_slow_link(communicator: Communicator) -> dict[str, Any]:
    """At the end all that is under way is waited for.

    Returns:
        What the courier rank's last state stands for, the dense averages, and counts.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 60, bias=False), nn.Tanh(), nn.Linear(60, 3)).double()
    twin = copy.deepcopy(model)
    reducer = GradientReducer(list(model.parameters()), communicator)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    link = FaultyLink()
    options: dict[str, Any] = {"damping": 0.1, "factor_period": 1, "kl_clip": None, "ema_decay": 0.7, "skip": "3"}
    brand = make_inverter("b-kfac", rank=4 * UPDATES, increment_rows=4)
    pre = kfdist.Preconditioner(model, brand, inverse_period=UPDATES, link=link, **options)
    dense = kfdist.Preconditioner(twin, "kfac", inverse_period=1, adoption=kfdist.FixedLag(0), **options)
    assert "Brand on A and G" in str(pre.coverage())
    for step in range(UPDATES):
        link.step = step
        x, y = images(4, seed=step)
        mine = slice(2 * communicator.rank, 2 * communicator.rank + 2)
        optimizer.zero_grad()
        twin.load_state_dict(model.state_dict())
        for each in (model, twin):
            nn.functional.cross_entropy(each(x[mine]), y[mine]).backward()
        reducer.reduce()
        dense.update()
        pre.step()
        optimizer.step()
    link.step = UPDATES
    deadline = time.monotonic() + 30
    while any("job" in entry for entry in pre.state_dict()["in_flight"].values()):
        assert time.monotonic() < deadline
        pre.pipeline.inverting.collect()
        time.sleep(0.002)
    dense.fold()
    sums = dense.state_dict()["sums"]["1"]
    found = {"truth": {name: unpack_triangle(mean) for name, mean in means(sums).items()}}
    head = pre.state_dict()["online"].get("1")
    if head is not None:
        merged = pre.counters()["merged_jobs"]
        found |= {"version": head["version"], "held": averages(head["payload"]), "merged": merged}
    pre.close()
    dense.close()
    reducer.close()
    return found


def averages(payload: bytes) -> dict[str, Tensor]:
    """Returns U w U^T / weight of both factors of a result's state."""
    state = decode_result(payload).outcomes["1"].state
    return {
        name: (state[f"U_{name}"] * state[f"w_{name}"].unsqueeze(-2)) @ state[f"U_{name}"].mT / state[f"weight_{name}"]
        for name in "AG"
    }


def test_increments_merged_behind_a_slow_link_are_the_dense_average(faults: Faults) -> None:
    # Results come at steps 0, 4 and 8 alone, each twice.
    faults.at(step=(1, 2, 3, 5, 6, 7, 9, 10), result=EACH).withhold()
    faults.at(result=EACH).twice()
    results = run_ranks(2, behind_a_slow_link)
    (courier,) = [found for found in results if "held" in found]
    assert courier["version"] == UPDATES - 1
    # Versions 2 to 4, 5 to 8 and 9 to 10 wait behind running jobs; all but the first of each join the one that waits.
    assert courier["merged"] >= 4
    for name in "AG":
        truth = courier["truth"][name]
        torch.testing.assert_close(courier["held"][name], truth, rtol=1e-10, atol=1e-10 * float(truth.abs().max()))

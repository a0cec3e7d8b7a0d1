"""Inversions on a device against the dense reference and the CPU's result: by the function, by an owner, by a run."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import kfdist
from kfdist.curvature.jobs import decode_result, encode_job, run_job
from kfdist.links.local import LocalLink
from kfdist.links.rank.remote import RemoteLink
from kfdist.owner.owner import Owner, OwnerOptions
from tests.support.cases import CASES, DAMPING, TOLERANCE, InverterCase
from tests.support.controller import ControllerThread
from tests.support.jobs import collect, context, job
from tests.support.matrices import C, P, Q, gaussian, make_factors, relative_error
from tests.support.on_devices import Trained
from tests.support.waits import eventually

SPECTRUM = "decaying"
V = gaussian(C, P, Q, seed=3)

over_cases = pytest.mark.parametrize(
    ("device", "case", "dtype"),
    [pytest.param("cpu", case, torch.float32, id=case.id) for case in CASES if not case.settings]
    + [
        pytest.param("cuda", case, dtype, marks=pytest.mark.gpu, id=f"{case.id}-{dtype}")
        for case in CASES
        for dtype in (torch.float32, torch.float64)
    ],
    indirect=["device"],
)


def payload(case: InverterCase, dtype: torch.dtype) -> bytes:
    return encode_job(
        inverter=case.make(),
        statistics={"block": case.statistics(make_factors(SPECTRUM, dtype))},
        damping=DAMPING,
        seeds={"block": 5},
        previous={},
        threads=1,
    )


def direction(result: bytes, dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
    """What the result makes of V, on a device."""
    outcome = decode_result(result, device=device).outcomes["block"]
    assert outcome.preconditioner is not None, outcome.reason
    return outcome.preconditioner.apply(V.to(device, dtype), DAMPING).cpu()


def check(case: InverterCase, dtype: torch.dtype, found: torch.Tensor) -> None:
    if SPECTRUM in case.spectra:
        assert relative_error(found, case.reference(make_factors(SPECTRUM, dtype), DAMPING, V)) <= TOLERANCE[dtype]
    expected = direction(run_job(payload(case, dtype)), dtype).double()
    assert relative_error(found, expected) <= TOLERANCE[dtype]


@over_cases
def test_every_method_inverts_and_applies_on_the_device(device: torch.device, case: InverterCase, dtype: torch.dtype):
    result = run_job(payload(case, dtype), device=device)
    check(case, dtype, direction(result, dtype, device))
    assert run_job(payload(case, dtype), device=device) == result, "whoever inverts, a result is always the same"


def test_the_local_links_inversions_wait_for_nothing_that_trains(
    device: torch.device, keep_busy: Callable[[], Callable[[], bool]]
) -> None:
    """And so the other way round: its thread has a stream of its own."""
    link = LocalLink(device.type)
    link.start(context())
    try:
        link.submit(job(version=0))  # loads the kernels
        first = collect(link, 1)["group", 0]
        busy = keep_busy()
        link.submit(job(version=1))
        link.wait(30)
        (second,) = link.poll()
        assert busy() == (device.type == "cuda"), "the inversion stood behind the device's other work"
    finally:
        link.close()
    assert second.payload == first.payload


@pytest.fixture
def controller(tmp_path: Path) -> Iterator[ControllerThread]:
    with ControllerThread(tmp_path / "control.sqlite") as running:
        yield running


@pytest.fixture
def owner(controller: ControllerThread, device_of_processes: torch.device) -> Iterator[Owner]:
    """An owner as a pool starts it for cluster.bundle.gpus = 0.5, in this process instead of Ray's."""
    options = OwnerOptions(
        owner_id="owner-0",
        threads=torch.get_num_threads(),
        device=device_of_processes.type,
        gpu_share=0.5,
        controller=controller.address,
    )
    made = Owner(options)
    eventually(made.status, lambda status: status["registered"], seconds=100)
    yield made
    made.close()


def test_an_owner_inverts_on_the_device(controller: ControllerThread, owner: Owner, device_of_processes: torch.device):
    assert owner.status()["fingerprint"].startswith(f"{device_of_processes.type};")
    link = RemoteLink(controller.address)
    link.start(context())
    try:
        for index, case in enumerate(CASES):
            link.submit(job(f"group{index}", data=payload(case, torch.float32)))
        results = collect(link, len(CASES), seconds=60)
    finally:
        link.close()
    for index, case in enumerate(CASES):
        check(case, torch.float32, direction(results[f"group{index}", 0].payload, torch.float32))


def test_a_run_with_a_fixed_lag_takes_inverses_of_owners_like_itself(
    controller: ControllerThread, owner: Owner, device_of_processes: torch.device
):
    """On the device too: twice the same, bit for bit."""
    found = []
    for run in ("first", "second"):
        service = kfdist.connect(controller.address, run=run, device=device_of_processes.type)
        trained = Trained(device_of_processes, method="rs-kfac", adoption=kfdist.FixedLag(2), link=service)
        with trained.pre:
            for seed in range(8):
                trained.step(seed)
            assert all(version >= 4 for version in trained.pre.versions().values())
        found.append(trained.parameters())
    assert owner.status()["completed"] >= 16
    assert torch.equal(found[0], found[1])

"""What a method keeps of a block, as README.md's table says; what doesn't fit is told before it is allocated."""

import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import kfdist
from kfdist.bench.workloads import SmallGpt
from kfdist.curvature.auto import Auto, MeasuredCosts
from kfdist.curvature.footprint import footprint
from kfdist.curvature.inverters import AbstractInverter, make_inverter
from kfdist.errors import EnvironmentFault
from kfdist.runtime.plan import capacity
from kfdist.runtime.plan.capacity import check_memory, need_of, wide_factors
from kfdist.runtime.plan.planner import make_plan
from kfdist.system.memory import Memory
from kfdist.types import BlockShape
from kfdist.wire.records import tensor_fields
from tests.support.plans import settings

ROOT = Path(__file__).parents[4]
P, Q, RANK, ROWS, EXAMPLES = 70, 90, 12, 20, 40
LOW = {"rank": RANK, "oversampling": 4}
SETTINGS: dict[str, dict[str, Any]] = {
    "kfac": {},
    "kfac-eigen": {},
    "ekfac": {"examples": EXAMPLES},
    "ekfac-adam": {"rank": RANK},
    "ekfac-adam, whole": {"rank": None},
    "rs-kfac": LOW,
    "sre-kfac": LOW,
    "b-kfac": LOW | {"increment_rows": ROWS},
    "b-r-kfac": LOW | {"increment_rows": ROWS},
    "b-kfac-c": LOW | {"increment_rows": ROWS},
    "cg-fac": {"examples": EXAMPLES},
    "seng": {"examples": EXAMPLES, "form": "explicit"},
    "seng, implicit": {"examples": EXAMPLES, "form": "implicit"},
    "eva": {},
}
BESIDE = {"cg-fac": 4 * P * Q} | {method: 5 * ROWS * (P + Q) for method in SETTINGS if method.startswith("b-")}
"""Of what the table says: what `cg-fac` takes while it solves, and the most that an update of Brand's adds."""


def inverter_of(case: str) -> AbstractInverter:
    return make_inverter(case.partition(",")[0], **SETTINGS[case])


def tensors_in(found: Any) -> list[torch.Tensor]:
    """Lists tensors in tuples and lists of them."""
    if isinstance(found, torch.Tensor):
        return [found]
    return [tensor for each in found for tensor in tensors_in(each)] if isinstance(found, tuple | list) else []


def kept_numbers(case: str) -> float:
    """Trains a layer for three steps, and counts the numbers that a rank then keeps of it."""
    torch.manual_seed(0)
    model = nn.Linear(Q - 1, P)
    preconditioner = kfdist.Preconditioner(
        model,
        inverter_of(case),
        factor_period=1,
        inverse_period=1,
        adoption=kfdist.FixedLag(0),
        kl_clip=None,
    )
    with preconditioner:
        for _ in range(3):
            model.zero_grad()
            model(torch.randn(EXAMPLES, Q - 1)).square().sum(1).mean().backward()
            preconditioner.step()
        pipeline = preconditioner.pipeline
        (sums,), (track,) = pipeline.reducer.sums.values(), pipeline.tracks
        snapshot = track.snapshot
        tensors = [*sums.sums.values()]
        for record in snapshot.preconditioners.values():
            tensors += tensor_fields(record).values()
        for state in snapshot.states.values():
            tensors += state.values()
        prepared = [each.prepared.form for each in track.memories.values() if each.prepared is not None]
        known = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        for each in tensors_in(prepared):
            if (place := each.untyped_storage().data_ptr()) not in known:  # a view takes nothing
                known.add(place)
                tensors.append(each)
        for memory in track.memories.values():
            tensors += memory.kept.values()
        head = 0 if track.jobs.head is None else len(track.jobs.head[1])
        return sum(tensor.numel() for tensor in tensors) + head / 4


def documented(case: str) -> float:
    """Returns what README.md's table says of a method, or of one of two forms."""
    method, _, form = case.partition(", ")
    row = re.search(rf"^\| \[`{method}`\].*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert row is not None
    formula = row.group().split("|")[4].replace("^", "**").replace(f"({form})", "").split(", or ")[bool(form)]
    formula = re.sub(r"(?<=[\w)]) (?=[\w(])", " * ", formula.strip())
    return eval(formula, {"p": P, "q": Q, "r": RANK, "n": ROWS, "N": EXAMPLES})  # noqa: S307 - our own table


@pytest.mark.parametrize("case", SETTINGS)
def test_a_block_takes_what_the_table_says(case: str):
    kept, said = kept_numbers(case), documented(case)
    # Headers, traces and eigenvalues are beside it; they don't grow with the product of two sizes.
    assert said - BESIDE.get(case, 0) - 1 <= kept <= said + 900 + 6 * (P + Q)
    assert kept <= footprint(inverter_of(case), BlockShape(d_out=P, d_in=Q)).kept / 4 + 900 + 6 * (P + Q)


def model_with_a_wide_head() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 5000))


def plan_of(method: Any, costs: MeasuredCosts | None = None):
    return make_plan(model_with_a_wide_head(), method, settings(), world_size=1, costs=costs)


def test_a_plan_that_does_not_fit_names_the_layer_its_bytes_what_there_is_and_what_fits():
    plan, there_is = plan_of("rs-kfac"), Memory(200 << 20, "the memory of a test")
    with pytest.raises(EnvironmentFault) as caught:
        check_memory(plan.groups, plan.device, there_is)
    text = str(caught.value)
    assert "layer '2' (33 inputs, 5000 outputs) with rs-kfac needs" in text
    assert "all 2 blocks together need" in text and "there are 200 MiB (the memory of a test)" in text
    named = re.search(r"(b-kfac)(?: with rank (\d+))? needs [\d.]+ MiB there", text)
    assert named is not None
    chosen = make_inverter(named.group(1), **({"rank": int(named.group(2))} if named.group(2) else {}))
    other = plan_of({"2": chosen, "*": "rs-kfac"})
    check_memory(other.groups, other.device, there_is)


def test_where_nothing_fits_it_is_said():
    plan = plan_of("rs-kfac")
    with pytest.raises(EnvironmentFault, match="No method fits: leave the layer out with skip"):
        check_memory(plan.groups, plan.device, Memory(1000, "nothing"))
    assert need_of(plan.groups, on_host=False) < need_of(plan.groups, on_host=True)


def test_a_plan_has_room_for_the_bytes_of_all_inverses_while_a_checkpoint_is_written():
    model = nn.Sequential(*[nn.Linear(120, 120) for _ in range(4)])
    torch.manual_seed(0)
    with kfdist.Preconditioner(model, "kfac-eigen", kl_clip=None, adoption=kfdist.FixedLag(0)) as preconditioner:
        model(torch.randn(40, 120)).square().sum(1).mean().backward()
        preconditioner.step()
        written = sum(len(each["payload"]) for each in preconditioner.state_dict()["snapshots"].values())
        assert preconditioner.state_dict(snapshots=False)["snapshots"] == {}
        groups = preconditioner.groups
        each = [footprint(group.inverter, block.shape) for group in groups for block in group.blocks]
        assert need_of(groups, on_host=True) == sum(one.kept + one.encoded for one in each) + each[0].inversion
        assert sum(one.encoded for one in each) == pytest.approx(written, rel=0.2)


def test_a_table_whose_method_is_fixed_is_given_no_other():
    plan = make_plan(nn.Sequential(nn.Embedding(16, 2000)), "kfac", settings(), world_size=1)
    with pytest.raises(EnvironmentFault, match=r"kfac-diagonal needs.*No method fits: leave the layer out with skip"):
        check_memory(plan.groups, plan.device, Memory(20 << 20, "a test"))  # where eva would fit


@pytest.mark.parametrize("memory", [math.inf, 200 << 20, 96 << 20, 8 << 20])
def test_auto_chooses_what_fits_together(memory: float):
    costs = MeasuredCosts(rates={}, memory=None if memory == math.inf else int(memory))
    assert MeasuredCosts.from_json(costs.to_json()) == costs
    plan = plan_of(Auto(), costs)
    methods = {group.name: group.inverter.name for group in plan.groups}
    assert methods["0"] == "kfac-eigen"
    assert methods["2"] == ("kfac-eigen" if memory == math.inf else "b-kfac" if memory >= 96 << 20 else "eva")
    check_memory(plan.groups, plan.device, Memory(costs.memory or 1 << 60, "agreed"))


HEAD = """
import resource, sys, torch
import kfdist
from kfdist.errors import EnvironmentFault
model = torch.nn.Sequential(torch.nn.Linear(64, 512, device="meta"), torch.nn.Linear(512, 60000, device="meta"))
model = model.to_empty(device="cpu")
resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
for method in sys.argv[1:]:
    print("with", method)
    try:
        with kfdist.Preconditioner(model, method, lr=0.1) as preconditioner:
            print(preconditioner.coverage())
    except EnvironmentFault as fault:
        print(fault)
"""


def test_a_head_of_60000_classes_under_a_limit_of_6_gb():
    command = [sys.executable, "-c", HEAD, "rs-kfac", "auto"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    refused, fits = done.stdout.split("with auto\n")
    for word in [r"layer '1' \(513 inputs, 60000 outputs\)", "RLIMIT_AS", "b-kfac needs", "skip"]:
        assert re.search(word, refused), done.stdout
    for word in [r"1\.weight +(b-kfac|eva) ", r"100\.00%"]:  # both fit; a busy machine may find Brand too slow
        assert re.search(word, fits), done.stdout


def test_a_wide_factor_is_warned_of_where_there_is_room_for_it(monkeypatch: pytest.MonkeyPatch):
    with torch.device("meta"):
        model = SmallGpt(layers=1, width=768, heads=12, characters=50_304)
    model.head.weight = model.characters.weight
    for method, skip, said in (
        ("rs-kfac", (), r"'head' with rs-kfac \(50304 x 50304, 9\.43 GiB on a rank, .* TFLOP an inversion\)\. Leave"),
        ("rs-kfac", ("head", "characters"), "^$"),
        ({"head": "eva", "*": "rs-kfac"}, (), "^$"),
        (kfdist.ByWidth(), (), "^$"),  # as kfdist.Optimizer has it: such a head has no block
    ):
        groups = make_plan(model, method, settings(skip=skip), world_size=1).groups
        assert re.search(said, wide_factors(groups)), wide_factors(groups)
    monkeypatch.setattr(capacity, "_WIDE", 4 * 5000**2)
    with pytest.warns(kfdist.KfdistWarning, match="'2' with rs-kfac"):
        kfdist.Preconditioner(model_with_a_wide_head(), lr=0.1).close()

"""Every method through the service, by one line of the configuration: two ranks, two owners, the digits.

Owners must give bit for bit what the ranks themselves compute, the adopted inverses must be those of the method that
was named, and it must train.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from kfdist.config import load_config
from kfdist.curvature.inverters import INVERTERS
from tests.support.forecasts import foretold
from tests.support.launches import launch, summary_of
from tests.support.service_methods import Trained, inversions, service, train

pytestmark = pytest.mark.timeout(300)

STEPS_IN_LOCKSTEP, STEPS_ASAP = 9, 200
LEAST_ACCURACY = 0.92
"""Where nothing else runs they come to 95 % and more; of 359 test images a standard deviation is one point, and a busy
machine's inverses are late."""

# Convolutions of 10 x 8 and 73 x 16, linear layers of 257 x 32 and 33 x 10: a step costs little, and the widest factor
# is wider than the ranks and rows below.
SMALL_CNN = ("optimizer.name=sgd", "model.settings.channels=8", "model.settings.hidden=32")
OWN = ("optimizer.name=kfdist", "preconditioner.factor_period=2", "preconditioner.inverse_period=10")
CHAIN = ("optimizer.name=sgd", "model.name=mlp", "model.settings.hidden=[64, 32]")
LOCKSTEP = ("adoption=fixed-lag", "lag=0", "inverse_period=4")

BRAND = ("settings.rank=32", "settings.increment_rows=128")
# Methods that take the curvature of one batch, and none of its past, are damped more; most where it is of few examples.
# So is exact damping of the eigenvalues where a busy machine lets the inverses get old.
DAMPED = ("damping=0.1",)

FORETOLD = {"rs-kfac", "ekfac", "seng"}
"""Methods whose memory and bytes are compared with what is foretold; tests/unit/forecast does it without owners."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """How a method is run.

    Attributes:
        own: Values of the section `preconditioner` besides the method.
        model: Values that choose the model, and its optimizer where the method asks for one.
        covered: What `coverage()` must say of at least one parameter.
    """

    own: tuple[str, ...] = ()
    model: tuple[str, ...] = SMALL_CNN
    covered: str = ""


CASES: Mapping[str, Case] = {
    "kfac": Case(),
    "kfac-eigen": Case(own=DAMPED),
    "kfac-tridiagonal": Case(model=CHAIN),
    "ekfac": Case(own=("settings.examples=64", *DAMPED)),
    "ekfac-adam": Case(model=(*SMALL_CNN, *OWN)),
    "rs-kfac": Case(own=("settings.rank=32",)),
    "sre-kfac": Case(own=("settings.rank=32",)),
    "b-kfac": Case(own=BRAND, covered="Brand on A"),
    "b-r-kfac": Case(own=BRAND, covered="Brand on A"),
    "b-kfac-c": Case(own=BRAND, covered="Brand on A"),
    "cg-fac": Case(own=("settings.examples=64", "settings.rows=1024", "settings.max_iterations=5", "damping=0.3")),
    "seng": Case(own=("settings.column_sample_size=16", *DAMPED), covered="sketched 256 of 8224 entries"),
    "eva": Case(own=DAMPED),
    "soap": Case(model=(*SMALL_CNN, *OWN)),
    "kl-shampoo": Case(model=(*SMALL_CNN, *OWN)),
    "shampoo": Case(model=(*SMALL_CNN, *OWN, "optimizer.lr=0.003")),
    "two-level": Case(covered="around kfac-eigen"),
    "auto": Case(own=DAMPED, covered="of a budget of"),
}


@pytest.fixture(scope="module")
def controller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with service(tmp_path_factory.mktemp("service")) as address:
        yield address


def overrides(method: str, case: Case, *more: str) -> list[str]:
    """The lines of the configuration in which a run differs from the default one."""
    own = (f"method={method}", *case.own, *more)
    return [*case.model, *(f"preconditioner.{line}" for line in own)]


def assert_the_named_method_did_it(method: str, ranks: Sequence[Trained]) -> None:
    """Checks that every block is preconditioned by what the method, and no fallback, has made."""
    methods = set(ranks[0].methods.values())
    assert methods <= set(INVERTERS) if method == "auto" else methods == {method}
    assert set(inversions(ranks)) == methods
    for seen in ranks:
        assert set(seen.adopted) == set(seen.methods)
        for block, kind in seen.adopted.items():
            assert issubclass(kind, INVERTERS[seen.methods[block]].produces), block
        assert seen.counters["inversions"]["failed"] == 0
        # Jobs may go out again: a courier that a busy machine keeps waiting counts as lost.
        for what in ("failures", "fallbacks", "degraded"):
            assert seen.counters[what] == {}, what


def test_the_table_has_every_method() -> None:
    assert set(CASES) == {*INVERTERS, "auto"}


QUICK = ("rs-kfac", "ekfac-adam", "seng")
"""One method of each kind of statistics; the others are in the slow tier, because each starts several processes."""

SOONER_OR_LATER = [pytest.param(method, marks=() if method in QUICK else pytest.mark.slow) for method in CASES]


@pytest.mark.parametrize("method", SOONER_OR_LATER)
def test_owners_give_bitwise_what_the_ranks_compute(method: str, controller: str, tmp_path: Path) -> None:
    case = CASES[method]
    lines = [*overrides(method, case, *LOCKSTEP), f"run.steps={STEPS_IN_LOCKSTEP}"]
    own, served = f"{method}-own", f"{method}-served"
    seen = train(tmp_path, {own: [*lines, "cluster.link=local"], served: [*lines, f"control.address={controller}"]})
    assert len({rank.parameters for ranks in seen.values() for rank in ranks}) == 1
    for ranks in seen.values():
        assert_the_named_method_did_it(method, ranks)
    assert any(case.covered in row.reason for row in seen[served][0].coverage), seen[served][0].coverage
    if method in FORETOLD:
        _assert_foretold(seen[served], lines)


def _assert_foretold(ranks: Sequence[Trained], lines: Sequence[str]) -> None:
    """Checks that `kfdist plan` knows what the ranks hold and what travels between them and the owners."""
    expected = foretold(load_config(None, overrides=lines, environment={}), steps=STEPS_IN_LOCKSTEP)
    sent: Counter[str] = Counter()
    for rank in ranks:
        assert expected.lasting == pytest.approx(rank.held, rel=0.1)
        sent.update(rank.counters["bytes"])
    for purpose, counted in (("jobs", "to_owners"), ("results", "from_owners")):
        assert expected.sent[purpose] == pytest.approx(sent[counted], rel=0.1), counted
    for purpose in ("statistics", "jobs", "results", "snapshots"):
        assert expected.sent[purpose] == pytest.approx(sent[purpose], rel=0.1), purpose


@pytest.mark.slow
@pytest.mark.parametrize("method", CASES)
def test_it_trains_with_owners_that_answer_when_they_can(method: str, controller: str, tmp_path: Path) -> None:
    lines = [*overrides(method, CASES[method]), f"run.steps={STEPS_ASAP}", f"control.address={controller}"]
    ranks = train(tmp_path, {f"{method}-asap": lines})[f"{method}-asap"]
    print(f"{method}: {ranks[0].accuracy:.2%}, {inversions(ranks)}")
    assert len({rank.parameters for rank in ranks}) == 1
    assert_the_named_method_did_it(method, ranks)
    assert ranks[0].accuracy >= LEAST_ACCURACY


@pytest.mark.slow
def test_the_fisher_of_the_models_own_predictions(controller: str, tmp_path: Path) -> None:
    """The trainer shows its output to the preconditioner; drawn targets and all targets are another Fisher each."""
    lines = [*overrides("kfac", Case(), *LOCKSTEP), f"run.steps={STEPS_IN_LOCKSTEP}"]
    runs = {}
    for fisher in ("empirical", "mc", "exact"):
        runs[f"{fisher}-own"] = [*lines, f"preconditioner.fisher={fisher}", "cluster.link=local"]
        runs[f"{fisher}-served"] = [*runs[f"{fisher}-own"][:-1], f"control.address={controller}"]
    seen = train(tmp_path, runs)
    parameters = {name: {rank.parameters for rank in ranks} for name, ranks in seen.items()}
    for fisher in ("empirical", "mc", "exact"):
        assert len(parameters[f"{fisher}-own"]) == 1
        assert parameters[f"{fisher}-own"] == parameters[f"{fisher}-served"]
        assert_the_named_method_did_it("kfac", seen[f"{fisher}-served"])
    assert len({each for digests in parameters.values() for each in digests}) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lines", "described", "methods"),
    [
        ([*overrides("b-kfac", CASES["b-kfac"]), "cluster.link=local"], "sgd with b-kfac,", {"b-kfac"}),
        (
            [
                *SMALL_CNN,
                "cluster.owners=1",
                'preconditioner.methods={"8" = "kfac", "6" = {method = "b-kfac", rank = 32, increment_rows = 128}, '
                '"2" = {method = "seng", examples = 64, column_sample_size = 8}, "*" = "eva"}',
            ],
            "sgd with 8: kfac, 6: b-kfac, 2: seng, *: eva,",
            {"kfac", "b-kfac", "seng", "eva"},
        ),
    ],
    ids=["one-line", "table with owners"],
)
def test_a_launch_with_the_method_in_its_configuration(
    tmp_path: Path, lines: Sequence[str], described: str, methods: set[str]
) -> None:
    settings = (*lines, "run.steps=30", "cluster.workers=1")
    with launch(tmp_path / "run", *(part for line in settings for part in ("--set", line))) as command:
        assert described in command.expect(0)
    summary = summary_of(tmp_path / "run")
    assert summary["status"] == "finished" and set(summary["inversions"]["by_method"]) == methods
    assert summary["failures"] == {} and summary["fallbacks"] == {}

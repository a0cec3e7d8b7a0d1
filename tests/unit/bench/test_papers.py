"""The claims of docs/papers.md: rules, and that every measurement runs; what they find is not for a test."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kfdist.bench.claim_a_brand import COST_LIMIT, ERROR_LIMIT, judge_cost, judge_error
from kfdist.bench.claim_b_cg import judge_cg
from kfdist.bench.claim_c_seng import judge_seng
from kfdist.bench.claim_d_reparametrisation import Convnet, Coordinates, judge_trajectories
from kfdist.bench.claim_e_widths import cheaper_than, exponent, judge
from kfdist.bench.claims import ClaimResult, Part, Verdict, less_at_every_width
from kfdist.bench.papers import CLAIMS, checked_claims, describe, run_claims
from kfdist.cli.main import run
from kfdist.errors import ConfigError

ROOT = Path(__file__).parents[3]


def part(holds: bool | None) -> Part:
    return Part(statement="it holds", holds=holds, seen="this")


@pytest.mark.parametrize(
    ("held", "verdict"),
    [
        ([True, True], Verdict.SHOWN),
        ([True, False], Verdict.NOT_SHOWN),
        ([None, False], Verdict.NOT_SHOWN),
        ([True, None], Verdict.IMPOSSIBLE),
        ([None], Verdict.IMPOSSIBLE),
    ],
)
def test_one_failing_part_refutes_and_one_unmeasured_leaves_open(held: list[bool | None], verdict: Verdict) -> None:
    parts = tuple(part(each) for each in held)
    result = ClaimResult(claim="x", title="", parts=parts, figures={}, conditions={}).to_json()
    assert result["verdict"] == verdict.value
    assert [each["holds"] for each in result["parts"]] == held


def test_a_claim_without_parts_has_no_verdict() -> None:
    with pytest.raises(ValueError, match="claim 'x' has no parts"):
        ClaimResult(claim="x", title="", parts=(), figures={}, conditions={})


def test_one_width_at_which_it_is_not_less_refutes() -> None:
    found = [less_at_every_width("less", pairs, "s") for pairs in ([], [(8, 1.0, 2.0)], [(8, 1.0, 2.0), (9, 2.0, 2.0)])]
    assert [each.holds for each in found] == [None, True, False]
    assert found[0].seen == "not measured"
    assert found[2].seen == "d = 8: 1 s, not 2 (2.0 times), d = 9: 2 s, not 2 (1.0 times)"


def test_rule_a_needs_both_less_error_and_little_cost() -> None:
    assert judge_error("action", {"rs-kfac": 1.0, "b-r-kfac": ERROR_LIMIT}).holds
    assert not judge_error("inverse", {"rs-kfac": 1.0, "b-r-kfac": ERROR_LIMIT + 0.01}).holds
    assert judge_cost(COST_LIMIT, 1.0, 0.5).holds
    assert not judge_cost(COST_LIMIT + 0.01, 1.0, 0.5).holds


def test_rule_b_asks_every_width_where_both_were_measured() -> None:
    def row(d: int, cg: float | None, kfac: float | None) -> dict[str, Any]:
        def cost(value: float | None) -> dict[str, float] | None:
            return None if value is None else dict.fromkeys(("peak_bytes", "seconds", "seconds_per_step"), value)

        return {"d": d, "cg-fac": cost(cg), "kfac": cost(kfac)}

    assert [each.holds for each in judge_cg([row(8, 1.0, 2.0), row(16, 2.0, None)])] == [True] * 3
    assert [each.holds for each in judge_cg([row(8, 1.0, 2.0), row(16, 2.0, 2.0)])] == [False] * 3
    assert [each.holds for each in judge_cg([row(8, 1.0, None)])] == [None] * 3


def seng_figures(**changes: float) -> dict[str, Any]:
    value = {"error": 1e-14, "bytes": 1.0, "invert": 1.0, "mean_field": 0.4, "local": 0.3, "alone": 0.0} | changes

    def form(error: float, size: float, seconds: float) -> dict[str, Any]:
        return {
            "error_to_dense": {"alike": error},
            "record_bytes": size,
            "invert_seconds": seconds,
            "apply_seconds": 1.0,
        }

    def ranks(local: float) -> dict[str, float]:
        return {"global_to_dense": value["error"], "local_average_to_dense": local}

    return {
        "gradient_to_dense": {"alike": 0.5},
        "forms": {
            "explicit": form(1e-14, 2.0, 2.0),
            "implicit": form(value["error"], value["bytes"], value["invert"]),
            "implicit, mean-field": form(value["mean_field"], 1.0, 1.0),
        },
        "aggregates": {"alike": {"1": ranks(value["alone"]), "2": ranks(value["local"]), "4": ranks(0.1)}},
    }


@pytest.mark.parametrize(
    ("changes", "failing"),
    [
        ({}, []),
        ({"error": 1e-9}, [0, 1]),
        ({"alone": 1e-9}, [1]),
        ({"bytes": 2.0}, [2]),
        ({"invert": 2.0}, [3]),
        ({"mean_field": 0.5}, [4]),
        ({"local": 0.6}, [5]),
    ],
)
def test_rule_c_looks_at_each_statement(changes: dict[str, float], failing: list[int]) -> None:
    parts = judge_seng(seng_figures(**changes))
    assert [index for index, each in enumerate(parts) if not each.holds] == failing


def test_rule_d_wants_kfc_alike_and_sgd_different() -> None:
    def held(unequal: float, kfc: float, sgd: float) -> list[bool | None]:
        return [each.holds for each in judge_trajectories(unequal, worst_kfc=kfc, least_sgd=sgd, last="kfc")]

    assert held(1e-15, 1e-4, 0.06) == [True, True, True]
    assert held(1e-9, 1e-4, 0.04) == [False, True, False]
    assert held(1e-15, 2e-3, 0.1) == [True, False, False]


def test_coordinates_leave_the_function_as_it_was() -> None:
    images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    raw, changed, other = (
        Convnet(at, seed=seed)(images).detach()
        for at, seed in (
            (Coordinates(), 3),
            (Coordinates(mean=0.3, scale=0.4, gain=0.5, shift=0.5), 3),
            (Coordinates(), 4),
        )
    )
    assert float((raw - changed).abs().max()) < 1e-13
    assert float((raw - other).abs().max()) > 1e-3


def test_rule_e_compares_large_layers_and_slopes() -> None:
    def rows(rs_power: float, *, eigen: bool = True) -> list[dict[str, Any]]:
        def at(d: int, power: float) -> dict[str, float]:
            return {"seconds": (d / 1000) ** power}

        return [
            {"d": d, "rs-kfac": at(d, rs_power), "kfac": at(d, 3.5), "kfac-eigen": at(d, 4.0) if eigen else None}
            for d in (500, 2000, 4000)
        ]

    assert exponent(rows(2.0), "rs-kfac") == pytest.approx(2.0)
    assert exponent(rows(2.0)[:1], "rs-kfac") is None
    assert [each.holds for each in judge(rows(2.0), wide=1000)] == [True, True]
    assert [each.holds for each in judge(rows(2.0), wide=2500)] == [True, None]  # one size has no exponent
    assert [each.holds for each in judge(rows(3.7), wide=1000)] == [True, False]
    assert [each.holds for each in judge(rows(2.0, eigen=False), wide=1000)] == [None, None]
    assert cheaper_than(rows(2.0), "kfac", "").holds is False  # dearer at d = 500
    assert cheaper_than(rows(2.0)[1:], "kfac", "").holds


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, dict[str, Any]], Path]:
    """All claims, measured once on small sizes, and the directory they were written to."""
    directory = tmp_path_factory.mktemp("papers")
    threads = torch.get_num_threads()
    found = {each["claim"]: each for each in run_claims([], quick=True, directory=directory)}
    assert torch.get_num_threads() == threads
    return found, directory


@pytest.mark.parametrize("claim", CLAIMS)
def test_every_claim_is_measured_and_written_with_its_machine(
    claim: str, quick: tuple[dict[str, dict[str, Any]], Path]
) -> None:
    content, path = quick[0][claim], quick[1] / f"papers_{claim}_quick.json"
    assert json.loads(path.read_text()) == content
    assert content["verdict"] in list(Verdict) and content["quick"]
    assert content["hardware"]["threads"] == 1 and "torch" in content["versions"]
    assert content["load_average"].keys() == {"start", "end"}
    assert content["conditions"] and content["figures"]
    text = describe(content)
    assert content["verdict"] in text and all(each["seen"] in text for each in content["parts"])


def test_small_sizes_find_what_doesnt_depend_on_size(quick: tuple[dict[str, dict[str, Any]], Path]) -> None:
    """Errors and invariance hold at any size; costs don't."""
    found, _ = quick
    assert [each["holds"] for each in found["a"]["parts"]][:2] == [True, True]
    assert [each["holds"] for each in found["c"]["parts"]][:3] == [True, True, True]
    assert found["d"]["verdict"] == "shown"
    difference = found["d"]["figures"]["difference_by_method"]
    assert all(math.isfinite(value) for row in difference.values() for value in row.values())


def test_claims_are_taken_once_and_in_order() -> None:
    assert checked_claims(["c", "a", "c"]) == ["a", "c"]
    assert checked_claims([]) == list(CLAIMS)
    with pytest.raises(ConfigError, match="'A' is not allowed; .*; did you mean 'a'?"):
        checked_claims(["A"])


def called(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["kfdist", "bench", "papers", *map(str, arguments)])
    return run()


def test_the_command_prints_a_row_or_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert called(monkeypatch, "--claim", "e", "--quick", "--out", tmp_path) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("e  ") and "load" in shown and str(tmp_path) in shown
    assert called(monkeypatch, "--claim", "e", "--quick", "--out", tmp_path, "--json") == 0
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert result == json.loads((tmp_path / "papers_e_quick.json").read_text())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--claim", "z"], ["--claim", "'z'", "'a', 'b', 'c', 'd', 'e'"]),
        (["--claim", "e", "--quick", "--out", "/dev/null"], ["--out", "/dev/null", "name another"]),
    ],
)
def test_bad_input_is_told_in_one_sentence(
    arguments: list[str], words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert called(monkeypatch, *arguments) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and all(word in message for word in words)


def test_help_needs_no_torch() -> None:
    script = "import sys\nfrom kfdist.cli import bench_command\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_every_claim_has_its_row_and_its_file() -> None:
    """docs/papers.md says what the last full measurement found."""
    text = (ROOT / "docs" / "papers.md").read_text()
    for claim in CLAIMS:
        written = json.loads((ROOT / "benchmarks" / "results" / f"papers_{claim}.json").read_text())
        assert not written["quick"]
        assert f"| {claim} | **{written['verdict']}** |" in text

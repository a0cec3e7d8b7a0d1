"""`kfdist plan` as users see it: on a terminal of 80 columns, as JSON, and of what it can't know."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kfdist.cli.main import app
from kfdist.errors import ConfigError

RUN = CliRunner()
MODELS = "tests.support.outlined_models"


def _told(*arguments: str) -> dict:
    done = RUN.invoke(app, ["plan", *arguments, "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.output)


def test_the_digits_run_in_eighty_columns() -> None:
    done = RUN.invoke(app, ["plan"])
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert max(map(len, lines)) <= 80
    heads = ("Blocks", "Memory of a rank", "Bytes of an average step", "Inversions in", "Staleness", "Advice")
    assert [head for head in heads if not any(line.startswith(head) for line in lines)] == []
    assert "100.00% of 151,306 trained parameters are preconditioned" in done.output


def test_ranks_owners_and_a_step_time_as_asked() -> None:
    told = _told("--world", "8", "--owners", "3", "--step-seconds", "1000", "--set", "preconditioner.inverse_period=20")
    assert "8 ranks x 64 examples, 3 owners" in told["run"]
    assert len(told["owners"]) == 3
    assert told["staleness"][0]["seconds"] == 1000 and told["staleness"][0]["source"] == "as given"
    assert told["staleness"][0]["ages"]["delay_steps"] == 4  # a step is enough for any of them; several ranks
    gradients = next(each for each in told["bytes_per_step"] if each["purpose"] == "gradients")
    assert gradients["total"] == 8 * 4 * 151_306
    assert gradients["wire"] == pytest.approx(4 * 151_306 * 2 * 7 / 8)
    assert told["advice"][0].startswith("With 3 owners staleness reaches 23 steps")
    default = _told("--step-seconds", "1000", "--owners", "1", "--world", "2")  # a basis every 20 steps, not every 100
    assert default["advice"][0].endswith("reaches 23 steps, within 33 steps, half a period beyond the least, 23.")


@pytest.mark.parametrize(("optimizer", "kept"), [("kfdist", 0), ("adamw", 2)])
def test_frozen_parameters_have_no_gradients_no_moments_and_are_counted_apart(optimizer: str, kept: int) -> None:
    model = f'model.name="{MODELS}:frozen_in_part"'
    told = _told("--world", "2", "--set", model, "--set", f'optimizer.name="{optimizer}"')
    trained, frozen = 32 * 10 + 10, 64 * 32 + 32
    covered = told["coverage"]
    assert (covered["trained"], covered["frozen"], covered["share"]) == (trained, frozen, 1.0)
    assert [row["frozen"] for row in covered["rows"]] == [64 * 32, 32, 0, 0]
    memory = {line["what"]: line["bytes"] for line in told["memory"]["lines"]}
    assert (memory["parameters"], memory["gradients"]) == (4 * (trained + frozen), 4 * trained)
    assert memory["optimizer state"] == pytest.approx(4 * kept * trained, abs=8)  # beside two numbers of steps
    sent = {each["purpose"]: each["total"] for each in told["bytes_per_step"]}
    assert sent["gradients"] == 2 * 4 * trained
    done = RUN.invoke(app, ["plan", "--set", model])
    said = " ".join(done.output.split())
    assert f"100.00% of {trained} trained parameters are preconditioned; {frozen:,} more are frozen" in said


@pytest.mark.parametrize("method", ["kfac", "none"])
def test_what_ranks_reduce_of_lazy_parameters_is_not_known(method: str) -> None:
    told = _told("--world", "2", "--set", f'model.name="{MODELS}:lazy"', "--set", f'preconditioner.method="{method}"')
    sent = {each["purpose"]: each["total"] for each in told["bytes_per_step"]}
    assert sent["gradients"] is None and sent["statistics"] is None


def test_gpus_have_figures_or_are_refused() -> None:
    told = _told("--gpu", "h200", "--gpu", "A100")
    by_name = {each["source"].split(":")[0]: each for each in told["staleness"]}
    assert by_name["derived for H200"]["seconds"] > 0 and by_name["derived for A100"]["seconds"] > 0
    assert "not measured" in by_name["derived for H200"]["source"]
    with pytest.raises(ConfigError, match="--gpu: 'H1000' is not allowed; choose one of 'T4', .* did you mean 'H100'"):
        RUN.invoke(app, ["plan", "--gpu", "H1000"], catch_exceptions=False)


def test_no_more_ranks_and_owners_than_a_controller_takes() -> None:
    for option, most in (("--world", 1 << 20), ("--owners", 4096)):
        with pytest.raises(ConfigError, match=f"is {most + 1}; it must be at most {most}"):
            RUN.invoke(app, ["plan", option, str(most + 1)], catch_exceptions=False)


def test_an_earlier_run_has_the_step_time_and_the_noise_scale(tmp_path: Path) -> None:
    summary = {"noise_scale": 20.0, "step_seconds": {"mean": 0.3, "p50": 0.25, "p99": 0.9}}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    told = _told("--from-run", str(tmp_path))
    assert told["staleness"][0]["seconds"] == 0.25 and "measured" in told["staleness"][0]["source"]
    assert any("critical batch is about 20 examples" in each for each in told["advice"])
    assert any("a smaller batch" in each for each in told["advice"])
    key = "preconditioner.settings.dense_settings.basis_period"
    assert any(f"a shorter {key} than 20" in each for each in told["advice"])
    (tmp_path / "summary.json").write_text(json.dumps({"status": "running"}))
    lines = [{"event": "start"}, {"event": "step", "step": 9, "step_seconds": 0.125, "noise_scale": None}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines) + '{"torn')
    assert _told("--from-run", str(tmp_path))["staleness"][0]["seconds"] == 0.125
    refused = RUN.invoke(app, ["plan", "--from-run", str(tmp_path / "none"), "--json"])
    assert "neither summary.json nor metrics.jsonl" in str(refused.exception)


def test_what_cannot_be_rehearsed_is_said_to_be_unknown() -> None:
    told = _told("--set", f'model.name="{MODELS}:branching"')
    assert "can't be rehearsed without values" in told["remarks"][0]
    unknown = {line["what"] for line in told["memory"]["lines"] if line["bytes"] is None}
    assert unknown == {"a batch's own statistics", "activations kept for the backward"}
    assert {each["purpose"] for each in told["bytes_per_step"] if each["total"] is None} == {"statistics", "jobs"}
    assert told["staleness"][0]["seconds"] is None
    assert RUN.invoke(app, ["plan", "--set", f'model.name="{MODELS}:branching"']).exit_code == 0


@pytest.mark.parametrize(
    "overrides",
    [
        ['preconditioner.method="none"'],
        ['cluster.link="local"'],
        pytest.param(['preconditioner.adoption="fixed-lag"', "preconditioner.lag=1"], marks=pytest.mark.slow),
        ['preconditioner.method="auto"'],
        ['preconditioner.method="ekfac"', "optimizer.average_decay=0.9"],
        ['preconditioner.method="b-kfac"', "preconditioner.settings={ rank = 8, increment_rows = 16 }"],
        pytest.param(['preconditioner.method="eva"'], marks=pytest.mark.slow),
        pytest.param(['model.name="mlp"', 'preconditioner.method="two-level"'], marks=pytest.mark.slow),
        ['model.name="mlp"', 'preconditioner.method="kfac-tridiagonal"', 'preconditioner.weight_sharing="reduce"'],
        ['preconditioner.method="cg-fac"', "preconditioner.settings={ examples = 16 }"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_every_kind_of_method_has_a_forecast(overrides: list[str]) -> None:
    told = _told(*[word for each in overrides for word in ("--set", each)])
    # Nothing is unknown but how many eigenpairs will be needed.
    assert [each for each in told["remarks"] if not re.search("direction_error|smaller jobs", each)] == []
    assert [line for line in told["memory"]["lines"] if line["bytes"] is None] == []
    assert [each for each in told["bytes_per_step"] if each["total"] is None] == []

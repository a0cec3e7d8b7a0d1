"""The ImageNet recipe in small, on a folder of JPEGs: interrupted in mid-epoch, it goes on with the same pixels."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.pictures import tear, write_folders
from tests.support.training import Stop, events, train

STEPS = 5
CHEAP = ("cluster.link=local", "checkpoint.period=0", 'preconditioner.skip=["layer4*"]')
"""The widest layers' factors would take most of the time."""


@pytest.mark.slow
def test_the_smoke_recipe_resumes_in_mid_epoch_bitwise_with_other_loader_processes(tmp_path: Path):
    root = write_folders(tmp_path / "pictures", classes=8, train=8, test=1)
    torn = root / "train" / "class_03" / "0005.jpg"
    tear(torn)

    def run(directory: str, *overrides: str, **options: Any) -> dict[str, Any]:
        common = (f"run.steps={STEPS}", f"data.settings.root={root}", "run.target_accuracy=0.01")
        return train(
            tmp_path / directory, *CHEAP, *common, *overrides, ranks=2, recipe="imagenet-resnet50-smoke", **options
        )

    whole = run("whole", "data.loader_processes=0")
    stopped = run("halves", stop=Stop(step=1, worker_rank=1))
    # 64 images in steps of 2 x 8: 4 steps an epoch.
    assert (stopped["status"], stopped["codes"], stopped["data_epochs"]) == ("stopped", [75, 75], 0)
    assert 1 <= stopped["steps"] < 4
    rest = run("halves", "data.loader_processes=0")
    assert len({*whole["parameter_sha256"], *rest["parameter_sha256"]}) == 1
    losses = [[line["loss"] for line in events(tmp_path / name, "step")] for name in ("whole", "halves")]
    assert losses[0] == losses[1] and len(losses[0]) == STEPS
    assert rest["metrics"] == whole["metrics"]
    assert {"test_top5_accuracy", "averaged_test_accuracy", "train_top5_accuracy"} <= rest["metrics"].keys()
    # An epoch's order takes every image, so the torn one was among them; and evaluations name their weights.
    assert whole["unreadable"]["examples"].keys() == {str(torn)}
    assert [line["name"] for line in events(tmp_path / "whole", "unreadable")] == [str(torn)]
    assert [(line["step"], line["weights"]) for line in events(tmp_path / "whole", "evaluation")] == [
        (4, "trained"),
        (4, "averaged"),
        (5, "trained"),
        (5, "averaged"),
    ]
    reached = rest["time_to_target"]["reached"]
    assert (reached["step"], reached["epoch"]) == (4, 1)
    assert 0 < reached["seconds"] <= rest["seconds"]
    assert whole["input_seconds"]["mean"] < whole["step_seconds"]["mean"]


def test_a_run_may_end_at_its_target(tmp_path: Path):
    options = ("run.target_accuracy=0.02", "run.stop_at_target=true", "run.eval_period=5")
    summary = train(tmp_path, *options, ranks=2)
    assert (summary["status"], summary["time_to_target"]["reached"]["step"]) == ("finished", summary["steps"])
    assert summary["steps"] < 40
    assert train(tmp_path, *options, ranks=2)["steps"] == summary["steps"]


@pytest.mark.slow
def test_too_many_unreadable_examples_end_the_run_on_all_ranks(tmp_path: Path):
    root = write_folders(tmp_path / "pictures", classes=2, train=16, test=2)
    for file in sorted(root.glob("train/*/00*.jpg"))[::3]:
        tear(file)
    options = (*CHEAP, f"data.settings.root={root}", "data.corrupt_limit=2", "data.loader_processes=0", "run.steps=2")
    with pytest.raises(
        AssertionError, match=r"EnvironmentFault: \d+ examples can't be read, data\.corrupt_limit allows 2"
    ):
        train(tmp_path / "run", *options, ranks=2, recipe="imagenet-resnet50-smoke")

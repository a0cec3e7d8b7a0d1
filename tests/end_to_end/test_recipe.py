"""The ImageNet recipe in small, by its name, with every process of the service."""

from pathlib import Path

import pytest

from tests.support.commands import Command
from tests.support.launches import checkpoints_of, summary_of
from tests.support.pictures import write_folders

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def launch(directory: Path, root: Path, *overrides: str) -> Command:
    settings = (
        "checkpoint.period=2",
        f"data.settings.root={root}",
        f"run.dir={directory}",
        "run.report=false",
        *overrides,
    )
    return Command("train", "imagenet-resnet50-smoke", *(word for each in settings for word in ("--set", each)))


def test_ctrl_c_in_mid_epoch_and_the_same_command_end_bitwise_as_the_calm_run(tmp_path: Path):
    # 128 images in steps of 2 x 8: 8 steps an epoch, 12 in all.
    root = write_folders(tmp_path / "pictures", classes=8, train=16, test=2)
    with launch(tmp_path / "calm", root) as command:
        command.expect(0, seconds=250)
        assert command.left_behind(5) == []
    with launch(tmp_path / "interrupted", root) as command:
        command.wait_for_line("step  3/12")
        command.signal()
        command.expect(75, seconds=60)
        assert command.left_behind(5) == []
    # On a busy machine ranks may be killed before their checkpoint is whole; then the one of step 2 is the newest.
    stopped_at = checkpoints_of(tmp_path / "interrupted")[-1]
    assert 2 <= stopped_at < 8
    with launch(tmp_path / "interrupted", root, "data.loader_processes=2") as command:
        command.wait_for_line(f"resumed at step {stopped_at}")
        command.expect(0, seconds=250)
        assert command.left_behind(5) == []
    calm, resumed = summary_of(tmp_path / "calm"), summary_of(tmp_path / "interrupted")
    assert len({*calm["parameter_sha256"], *resumed["parameter_sha256"]}) == 1
    assert (resumed["status"], resumed["steps"], resumed["rank_modules_clean"]) == ("finished", 12, True)
    assert resumed["metrics"] == calm["metrics"]

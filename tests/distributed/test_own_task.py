"""A model and data of the user's own, with the guarantee of the bundled ones: resumed, it is bitwise the same run."""

import tomllib
from pathlib import Path

from tests.support.training import FIXED_LAG, events, train

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_task.toml"


def test_the_example_learns_and_resumes_in_mid_epoch_bitwise_with_other_loader_processes(tmp_path: Path):
    table = tomllib.loads(EXAMPLE.read_text())
    common = (
        *FIXED_LAG,
        *(f"{section}.name={table[section]['name']}" for section in ("model", "data")),
        "data.settings.noise=0.1",
        "preconditioner.method=kfac",
    )
    whole = train(tmp_path / "whole", *common, "data.loader_processes=0", ranks=2)
    # 400 examples in steps of 2 x 8: 25 steps an epoch. A loader process imports torch, which takes most of its time.
    half = train(tmp_path / "halves", *common, "data.loader_processes=0", "run.steps=30", ranks=2)
    assert (half["steps"], half["data_epochs"]) == (30, 1)
    rest = train(tmp_path / "halves", *common, "data.loader_processes=2", ranks=2)
    assert len({*whole["parameter_sha256"], *rest["parameter_sha256"]}) == 1
    assert rest["metrics"] == whole["metrics"]
    assert rest["metrics"]["test_distance"] < 0.6 * events(tmp_path / "whole", "step")[0]["distance"]
    assert whole["input_seconds"]["mean"] > 0
    assert whole["unreadable"] == {"count": 0, "examples": {}}

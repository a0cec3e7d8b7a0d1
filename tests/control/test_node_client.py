"""A program in another language, which knows the .proto files alone, lists, watches and updates a run."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from kfdist.types import InForce
from tests.support.protos import PROTOS

FOLDER = Path(__file__).parents[1] / "node"


@pytest.mark.parametrize("controller", [60.0], indirect=True, ids=["long-lease"])
def test_a_node_client_lists_watches_and_updates_a_run(controller, client, member) -> None:
    if shutil.which("node") is None or not (FOLDER / "node_modules").exists():
        pytest.skip("Node.js or its packages are missing; `make node` installs them")
    values = {"damping": 0.03, "factor_period": 2, "inverse_period": 10, "adoption": "asap"}
    client.create("digits", total_steps=120)
    member.register_worker("digits")
    member.beat_worker("digits", step=7, in_force=InForce(values=values))
    environment = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    ended = subprocess.run(
        ["node", FOLDER / "client.js", PROTOS, controller.address, "digits"],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    before = found["before"]
    assert (before["state"], before["totalSteps"], before["settings"]["inversePeriod"]) == (
        "RUN_STATE_RUNNING",
        120,
        10,
    )
    assert found["watched"] == [before["revision"] + 1, before["revision"] + 2]
    assert found["repeated"], "a repeated request id has the first one's answer"
    assert found["refused"]["code"] == 3 and found["refused"]["details"].startswith(
        "damping: is 0.0; it must be greater"
    )
    texts = [text for kind, text in found["events"] if kind == "settings_changed"]
    assert [text.split(" at step")[0] for text in texts] == [
        "node@test set damping from 0.03 to 0.5",
        "node@test set inverse_period from 10 to 20",
    ]
    settings = member.beat_worker("digits").settings
    assert (settings.desired, settings.damping, settings.inverse_period) == ("paused", 0.5, 20)

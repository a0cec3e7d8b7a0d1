"""Which names are public, and what one costs at its first use."""

import subprocess
import sys
from pathlib import Path

import pytest

import kfdist
from kfdist import errors

ROOT = Path(__file__).parents[2]

SCRIPT = """
import gc
import torch
begun, enabled = [], {enabled}
if not enabled:
    gc.disable()
gc.callbacks.append(lambda phase, found: begun.append(phase))
import kfdist
kfdist.Preconditioner
found = len(begun) // 2
assert gc.isenabled() == enabled
try:
    kfdist.Missing
except AttributeError:
    assert gc.isenabled() == enabled
print(found)
"""


@pytest.mark.parametrize("enabled", [True, False])
def test_a_first_use_collects_no_garbage_of_others_and_leaves_the_collector_as_it_was(enabled: bool) -> None:
    code = SCRIPT.replace("{enabled}", str(enabled))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) <= 3, "without the pause there are forty, one of them full"


def test_every_error_that_users_may_have_to_catch_is_public_and_on_the_page_of_loops() -> None:
    kinds = (errors.KfdistError, errors.KfdistWarning)
    made = {name: each for name, each in vars(errors).items() if isinstance(each, type) and issubclass(each, kinds)}
    assert {"Interrupted", "ModelChanged", "CheckpointError"} <= made.keys() <= set(kfdist.__all__)
    assert all(getattr(kfdist, name) is each for name, each in made.items())
    page = (ROOT / "docs" / "own-tasks.md").read_text(encoding="utf-8")
    _, _, told = page.partition("### What a loop may have to catch")
    assert [name for name in made if f"`{name}`" not in told and f"`kfdist.{name}`" not in told] == []

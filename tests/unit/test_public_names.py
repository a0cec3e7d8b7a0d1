"""What a public name costs at its first use."""

import subprocess
import sys

import pytest

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

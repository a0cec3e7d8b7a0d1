"""A script needs no close(): its end is an ordinary one, and a link that is forgotten holds no thread."""

import gc
import subprocess
import sys
import textwrap
import threading

import pytest
import torch
from torch import nn

import kfdist
from kfdist.links.rank import pump

SCRIPT = """
    import sys

    import torch
    from torch import nn

    import kfdist

    model = nn.Sequential(nn.Linear(1000, 1000), nn.ReLU(), nn.Linear(1000, 1000))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    preconditioner = kfdist.Preconditioner(model, method="kfac-eigen", adoption="asap").attach(optimizer)
    model(torch.randn(8, 1000)).square().mean().backward()
    optimizer.step()  # the inversions begin, and take longer than the rest of the script
    print("trained", flush=True)
"""


@pytest.mark.parametrize(
    ("last_line", "code"),
    [
        ("", 0),
        pytest.param("sys.exit(3)", 3, marks=pytest.mark.slow),
        pytest.param("raise ValueError('the script')", 1, marks=pytest.mark.slow),
    ],
    ids=["end", "exit", "raise"],
)
def test_a_script_that_ends_while_a_thread_inverts_ends_ordinarily(last_line: str, code: int):
    script = textwrap.dedent(SCRIPT) + last_line
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert "trained" in ended.stdout, ended.stderr
    assert ended.returncode == code, ended.stderr
    assert ("the script" in ended.stderr) == (code == 1)


def test_a_preconditioner_that_is_forgotten_holds_no_thread():
    def train() -> None:
        model = nn.Linear(3, 3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        kfdist.Preconditioner(model, method="kfac").attach(optimizer)
        model(torch.randn(2, 3)).sum().backward()
        optimizer.step()

    gc.collect()
    before = set(threading.enumerate())
    train()
    gc.collect()
    assert set(threading.enumerate()) <= before


def test_a_link_whose_thread_can_not_begin_says_so(start_link, monkeypatch):
    def refuse(count: int) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(pump, "set_own_threads", refuse)
    link = start_link("127.0.0.1:9")
    link.wait(30)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        link.poll()

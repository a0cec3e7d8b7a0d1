"""The link in training scripts as people write and run them: no main guard, standard input, forking data loaders."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.jobs import payload

ROOT = Path(__file__).parents[2]

SCRIPT = """
import hashlib, os, sys
sys.path.insert(0, {root!r})
from kfdist.links.link import LinkContext
from kfdist.links.rank.remote import RemoteLink
from kfdist.types import GroupSpec, Job, LateBytes

print("script runs in", os.getpid(), flush=True)  # once, or somebody has run it again
name = f"scripts-{{os.getpid()}}"  # another one's lease may last longer than it
data = open({file!r}, "rb").read()
link = RemoteLink({address!r})
link.start(LinkContext(run=name, epoch=1, worker_rank=0, world_size=1,
    groups=[GroupSpec(name="g", cost=1.0, position=0, bytes=1)], fingerprint=""))

def submit(version):
    link.submit(Job(run=name, epoch=1, group="g", version=version, content=LateBytes.of(data),
        deadline_seconds=60.0))

def result():
    while not (results := link.poll()):
        link.wait(1.0)
    (only,) = results
    return hashlib.sha256(only.payload).hexdigest()

{body}
assert not {{"grpc", "ray"}} & set(sys.modules), "the rank has loaded gRPC or Ray"
link.close()
print("done", len(set(digests)), len(digests), flush=True)
"""

PLAIN = """
digests = []
for version in range(3):
    submit(version)
    digests.append(result())
"""

LOADER = """
import torch
from torch.utils.data import DataLoader, TensorDataset

assert "fork" in torch.multiprocessing.get_all_start_methods()
digests = []
for epoch in range(2):
    loader = DataLoader(TensorDataset(torch.arange(64.0)), batch_size=4, num_workers=4, multiprocessing_context="fork")
    seen = 0
    for version, (batch,) in enumerate(loader):
        submit(1000 * epoch + version)  # workers are alive, and the link works, at the same time
        seen += len(batch)
        digests.append(result())
    assert seen == 64
"""


@pytest.fixture
def script(tmp_path, controller, owners):
    del owners

    def write(body: str, data: bytes) -> str:
        file = tmp_path / "payload"
        file.write_bytes(data)
        return SCRIPT.format(root=str(ROOT), file=str(file), address=controller.address, body=body)

    return write


def run(command: list[str], folder: Path, *, text: str | None = None) -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True, cwd=folder, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("script runs in") == 1, done.stdout
    return done.stdout


def test_a_script_without_a_main_guard(script, tmp_path):
    (tmp_path / "train.py").write_text(script(PLAIN, payload()))
    # Files that a careless interpreter in this directory would import instead of the real ones.
    (tmp_path / "asyncio.py").write_text("raise SystemExit('the wrong asyncio')")
    (tmp_path / "grpc.py").write_text("raise SystemExit('the wrong grpc')")
    assert "done 1 3" in run([sys.executable, "-P", "train.py"], tmp_path)


@pytest.mark.slow  # the next one comes that way, too
def test_a_script_on_standard_input(script, tmp_path):
    assert "done 1 3" in run([sys.executable, "-"], tmp_path, text=script(PLAIN, payload()))


def test_a_data_loader_that_forks(script, tmp_path):
    assert "done 1 32" in run([sys.executable, "-"], tmp_path, text=script(LOADER, payload()))


def test_payloads_larger_than_dev_shm(script, tmp_path):
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode != 0:
        pytest.skip("no right to make a mount namespace")
    data = payload(256, blocks=72)  # 19 MB there, 19 MB back
    assert len(data) > 16 << 20
    (tmp_path / "train.py").write_text(script(PLAIN.replace("range(3)", "range(1)"), data))
    mount = "mount -t tmpfs -o size=16m tmpfs /dev/shm && test $(df -k --output=size /dev/shm | tail -1) = 16384"
    out = run(["unshare", "-m", "sh", "-c", f"{mount} && exec {sys.executable} train.py"], tmp_path)
    assert "done 1 1" in out
    assert os.statvfs("/dev/shm").f_blocks * os.statvfs("/dev/shm").f_frsize != 16 << 20

"""Shows that two commits compute the same numbers, bit for bit: what each method ships, gets back and trains.

    python benchmarks/compare_commits.py OLD [NEW]

NEW is the working tree unless given. Each commit is checked out into a temporary git worktree, and the
compare_commits_probe.py beside this file trains small models with the kfdist found there; so changes of files, names
and job containers don't count, as long as the probe can read both. Prints one line per item. Exits with 1 if anything
differs or exists in one commit only, and with 2 if a commit couldn't be measured.

The commits run side by side, with this Python and its packages; 70 to 77 s on two busy cores.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
PROBE = Path(__file__).with_name("compare_commits_probe.py")
SHOWN = 5
TIMEOUT_SECONDS = 600


def git(*arguments: str) -> str:
    """Runs git in this checkout and returns its output, or ends the script with its complaint."""
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    if done.returncode:
        print(f"git {' '.join(arguments)}: {done.stderr.strip()}", file=sys.stderr)
        raise SystemExit(2)
    return done.stdout.strip()


@contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """Checks a commit out into a temporary folder for the duration of the `with`."""
    with tempfile.TemporaryDirectory(prefix="kfdist-compare-") as scratch:
        tree = Path(scratch) / "tree"
        git("worktree", "add", "--quiet", "--detach", str(tree), commit)
        try:
            yield tree
        finally:
            git("worktree", "remove", "--force", str(tree))


def start_probe(tree: Path, out: Path) -> subprocess.Popen[bytes]:
    """Starts to measure a tree; its output goes to a file beside `out`."""
    path = os.pathsep.join(part for part in (str(tree), os.environ.get("PYTHONPATH", "")) if part)
    command = [sys.executable, str(PROBE), str(tree), str(out)]
    with out.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(
            command, cwd=out.parent, env={**os.environ, "PYTHONPATH": path}, stdout=log, stderr=subprocess.STDOUT
        )


def measure(trees: dict[str, Path]) -> list[dict[str, dict[str, Any]]]:
    """Returns the items of each tree, by name, or ends the script with the last output of a probe that failed."""
    with tempfile.TemporaryDirectory() as scratch:
        outs = [Path(scratch) / f"{index}.pt" for index in range(len(trees))]
        probes = [start_probe(tree, out) for tree, out in zip(trees.values(), outs, strict=True)]
        try:
            codes = [probe.wait(timeout=TIMEOUT_SECONDS) for probe in probes]
        finally:
            for probe in probes:
                if probe.poll() is None:
                    probe.kill()
                    probe.wait()
        for name, out, code in zip(trees, outs, codes, strict=True):
            if code:
                tail = out.with_suffix(".log").read_text(errors="replace").splitlines()[-30:]
                print("\n".join([f"the probe failed in {name}:", *tail]), file=sys.stderr)
        if any(codes):
            raise SystemExit(2)
        return [torch.load(out) for out in outs]


def difference(old: Any, new: Any) -> str:
    """Says how two numbers differ; empty if they are equal bit for bit."""
    if not (isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor)):
        same = type(old) is type(new) and repr(old) == repr(new)  # repr tells 0.0 from -0.0, and NaN equals itself
        return "" if same else f"{describe(old)} became {describe(new)}"
    if (old.dtype, old.shape) != (new.dtype, new.shape):
        return f"{describe(old)} became {describe(new)}"
    if old.contiguous().numpy().tobytes() == new.contiguous().numpy().tobytes():
        return ""
    scale = old.double().abs().max().item()
    return (
        f"{describe(old)} differs by {(old.double() - new.double()).abs().max().item():.3g} in numbers to {scale:.3g}"
    )


def describe(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Returns one line for each key whose numbers differ, or that only one side has."""
    lines = [f"{key}: only before" for key in old if key not in new]
    lines += [f"{key}: only after" for key in new if key not in old]
    found = {key: difference(old[key], new[key]) for key in old if key in new}
    return lines + [f"{key}: {text}" for key, text in found.items() if text]


def report(old: dict[str, dict[str, Any]], new: dict[str, dict[str, Any]]) -> int:
    """Prints a line for each item, and the first differences under it; returns how many items differ."""
    different = 0
    for item in [*old, *(each for each in new if each not in old)]:
        if item not in old or item not in new:
            print(f"DIFFERS {item}: only {'before' if item in old else 'after'}")
            different += 1
            continue
        lines = differences(old[item], new[item])
        payloads = {key.split(":")[0] for key in old[item] if key.startswith(("job ", "result "))}
        sources = f"{len(payloads)} jobs and results and the model" if payloads else "the model"
        size = f"{len(old[item])} numbers and tensors of {sources}"
        digest = old[item]["parameter_sha256"][:12]
        if not lines:
            print(f"same    {item}: {size}, parameters {digest}")
            continue
        different += 1
        print(f"DIFFERS {item}: {len(lines)} of {size}")
        for line in lines[:SHOWN]:
            print(f"        {line}")
    return different


def main() -> None:
    """Measures both and compares."""
    if len(sys.argv) not in (2, 3):
        raise SystemExit("usage: python benchmarks/compare_commits.py OLD [NEW]")
    begun = time.perf_counter()
    old_name, new_name = sys.argv[1], sys.argv[2] if len(sys.argv) == 3 else "the working tree"
    commits = [git("rev-parse", "--verify", "--short", f"{each}^{{commit}}") for each in sys.argv[1:]]
    with ExitStack() as stack:
        trees = [stack.enter_context(checkout(commit)) for commit in commits]
        old, new = measure(dict(zip(("OLD", "NEW"), [*trees, ROOT][:2], strict=True)))
    different = report(old, new)
    verdict = f"{different} items differ" if different else f"all {len(old)} items are the same, bit for bit"
    print(f"{old_name} to {new_name}: {verdict}; {time.perf_counter() - begun:.0f} s")
    raise SystemExit(1 if different else 0)


if __name__ == "__main__":
    main()

"""What docs/optimizer.md shows runs as shown, and names what is there."""

import re
from pathlib import Path

import torch

from kfdist.curvature.by_width import ByWidth
from kfdist.optim.graft import KEPT

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "optimizer.md").read_text(encoding="utf-8")


def test_the_example_runs() -> None:
    (example,) = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
    with torch.random.fork_rng():
        exec(compile(example, "<optimizer.md>", "exec"), {"__name__": "example"})


def test_the_widths_and_grafts_are_those_of_the_code() -> None:
    assert f"up to {ByWidth().eigen:,} wide" in PAGE
    assert f"up to {ByWidth().sketched:,} wide" in PAGE
    for graft in KEPT:
        assert f'"{graft}"' in PAGE

"""What docs/tuning.md names exists."""

import inspect
import re
from pathlib import Path

import kfdist
from kfdist.curvature.inverters.rs_kfac import RsKfac
from kfdist.telemetry.metrics import METRICS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "tuning.md").read_text(encoding="utf-8")
QUOTED = set(re.findall(r"`([^`\n]+)`", PAGE))


def test_metrics_exist():
    named = {each for each in QUOTED if each.startswith("kfdist_")}
    assert len(named) >= 6
    assert named <= set(METRICS)


def test_settings_exist():
    known = {
        name
        for made in (kfdist.Preconditioner, kfdist.Optimizer, kfdist.Sampling, RsKfac)
        for name in inspect.signature(made).parameters
    }
    named = {each.partition("=")[0] for each in QUOTED if re.fullmatch(r'[a-z_]+(="[a-z-]+")?', each)}
    assert named - {"observe"} - set(METRICS) <= known
    assert hasattr(kfdist.Preconditioner, "observe")

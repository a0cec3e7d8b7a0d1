from pathlib import Path

import pytest

from kfdist.report.page import write_report
from tests.support import browser

pytestmark = pytest.mark.skipif(
    browser.PROGRAM is None, reason="no Chromium here to look at reports; Debian's package is chromium-headless-shell"
)

_LOOK = {
    "paper": "getComputedStyle(document.body).backgroundColor",
    "ink": "getComputedStyle(document.querySelector('figure svg text')).fill",
    "curve": "getComputedStyle(document.querySelector('figure svg #p1-1-axes_1 [id*=line2d] path[clip-path]')).stroke",
    "widest": "Math.max(...[...document.querySelectorAll('figure svg')].map("
    "each => each.getBoundingClientRect().right))",
    "smallest": "Math.min(...[...document.querySelectorAll('figure svg text')].map("
    "each => each.getBoundingClientRect().height))",
    "unnamed": "[...document.querySelectorAll('svg')].filter(each => !each.closest('[role=img][aria-label]')).length",
}


def test_a_page_fits_its_reader(finished: Path, tmp_path: Path) -> None:
    page = write_report(finished, tmp_path / "report.html")
    views = [browser.View(width, dark=dark, opened=True) for width in (390, 1280) for dark in (False, True)]
    seen = browser.look_at(page, views, _LOOK)
    for view, found in zip(views, seen, strict=True):
        assert found.complaints == []
        assert {address.partition(":")[0] for address in found.requests} == {"file", "data"}
        assert found.scroll_width <= view.width
        assert found.values["widest"] <= view.width
        assert found.values["smallest"] >= 8
        assert found.values["unnamed"] == 0
    light, dark, *_ = seen
    assert light.values["paper"] == "rgb(255, 255, 255)"
    for part in ("paper", "ink", "curve"):
        assert light.values[part] != dark.values[part]
        assert light.values[part].startswith("rgb(") and dark.values[part].startswith("rgb(")

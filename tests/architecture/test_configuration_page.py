"""docs/configuration.md is what the configuration's code says."""

import runpy
from pathlib import Path

from kfdist.config import load_config
from kfdist.training.run_directory import flat

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")


def test_the_page_is_what_the_script_writes() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "make_configuration.py"))["text"]()
    assert made == PAGE, "run docs/make_configuration.py"


def test_every_key_has_its_row() -> None:
    keys = flat(load_config(None, environment={}).model_dump())
    for path in keys:
        section, _, key = path.rpartition(".")
        if "settings" not in section:
            table = PAGE.partition(f"## `[{section}]`\n")[2].partition("\n## ")[0]
            assert f"\n| `{key}` |" in table, path

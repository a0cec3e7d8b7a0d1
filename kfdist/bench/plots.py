"""Figures of measurements, in the report's style, each a file of its own."""

import re
from importlib import resources


def standalone(svg: str) -> str:
    """Makes a figure that takes its colours from the report's page a file of its own, light and dark."""
    page = resources.files("kfdist.report").joinpath("page.html").read_text(encoding="utf-8")
    colours = page[page.index(":root") : page.index("* { box-sizing")].replace(":root", "svg")
    style = f"<style>\n{colours}svg {{ background: var(--paper); font-family: sans-serif; }}\n</style>"
    return re.sub(r"<svg\b([^>]*)>", lambda found: f'<svg width="640"{found[1]}>\n{style}', svg, count=1)

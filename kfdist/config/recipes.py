"""Configurations that come with kfdist, by name: kfdist/recipes/NAME.toml."""

from collections.abc import Mapping
from pathlib import Path

_FOLDER = Path(__file__).parents[1] / "recipes"


def recipes() -> Mapping[str, Path]:
    """Returns the files by name, in order."""
    return {file.stem: file for file in sorted(_FOLDER.glob("*.toml"))}


def described(recipe: Path) -> str:
    """Returns what a recipe says of itself in its first line."""
    return recipe.read_text(encoding="utf-8").partition("\n")[0].removeprefix("#").strip()

"""A name leads to one place: files, classes, folders of tests. Today's exceptions are listed; the lists only shrink."""

import ast
from collections import defaultdict

from tests.support.sources import FILES, PACKAGE, ROOT, tree_of

OF_EVERY_PACKAGE = {"__init__.py", "__main__.py"}
TWIN_CLASSES = {("LearningRate", "LearningRates")}


def test_no_two_files_share_a_name() -> None:
    folders = defaultdict(list)
    for path in FILES:
        folders[path.name].append(str(path.parent.relative_to(ROOT)))
    shared = {name: of for name, of in folders.items() if len(of) > 1 and name not in OF_EVERY_PACKAGE}
    assert shared == {}


def _public_classes() -> set[str]:
    classes = {node.name for path in FILES for node in tree_of(path).body if isinstance(node, ast.ClassDef)}
    return {name for name in classes if not name.startswith("_")}


def test_no_two_public_classes_differ_by_a_letter_at_the_end() -> None:
    classes = _public_classes()
    # A method's variant may end in a capital, as B-KFAC-C does.
    assert {(name[:-1], name) for name in classes if name[-1].islower() and name[:-1] in classes} == TWIN_CLASSES


def test_unit_tests_lie_where_their_subject_does() -> None:
    unit = ROOT / "tests" / "unit"
    folders = {path.parent.relative_to(unit) for path in unit.rglob("test_*.py")}
    assert [str(folder) for folder in sorted(folders) if not (PACKAGE / folder).is_dir()] == []


def test_contributing_sends_readers_to_places_that_are_there() -> None:
    lines = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()
    rows = [line.split("|")[2] for line in lines if line.startswith("| ") and line != "| what | where |"]
    places = [place for row in rows for place in row.split("`")[1::2]]
    assert len(rows) == 22
    assert [place for place in places if not (PACKAGE / place).exists()] == []

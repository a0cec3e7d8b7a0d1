"""What was committed is what is loaded, whatever the records hold."""

import math
from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import given, settings
from hypothesis import strategies as st

from kfdist.control.control_records import AssignmentRecord, OwnerRecord, RunRecord
from kfdist.control.store import Answer, Batch, Contents, RunUpdate, Store

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
OWNERS = st.builds(OwnerRecord, owner_id=TEXT, address=TEXT)


def loaded(path: Path) -> Contents:
    store = Store(path)
    try:
        return store.load()
    finally:
        store.close()


def committed(path: Path, *batches: Batch) -> Contents:
    store = Store(path)
    try:
        for batch in batches:
            store.commit(batch)
    finally:
        store.close()
    return loaded(path)


@settings(max_examples=30, deadline=None)
@given(
    st.builds(RunRecord, name=TEXT, gauges=st.dictionaries(TEXT, st.floats(allow_nan=False))),
    st.builds(AssignmentRecord, run=TEXT),
    OWNERS,
)
def test_records_come_back_as_they_were(run, assignment, owner):
    batch = Batch(time_ns=1, runs=(RunUpdate(record=run, message=b"m"),), assignments=(assignment,), owners=(owner,))
    with TemporaryDirectory() as folder:
        contents = committed(Path(folder) / "c.sqlite", batch)
    assert contents.runs == {run.name: run}
    assert contents.assignments == {assignment.run: assignment}
    assert contents.owners == {owner.owner_id: owner}


def test_a_loss_that_is_no_number_comes_back(tmp_path):
    run = RunRecord(name="r", gauges={"kfdist_loss": math.nan, "kfdist_damping": math.inf})
    gauges = committed(tmp_path / "c", Batch(time_ns=1, runs=(RunUpdate(record=run, message=b""),))).runs["r"].gauges
    assert math.isnan(gauges["kfdist_loss"])
    assert gauges["kfdist_damping"] == math.inf


def test_runs_keep_the_order_in_which_they_were_made_known(tmp_path):
    updates = [
        RunUpdate(record=RunRecord(name=name, revision=revision, step=revision), message=b"")
        for revision, name in [(1, "b"), (1, "a"), (2, "b")]
    ]
    contents = committed(tmp_path / "c", *(Batch(time_ns=1, runs=(update,)) for update in updates))
    assert [(run.name, run.step) for run in contents.runs.values()] == [("b", 2), ("a", 1)]


def test_old_changes_and_answers_give_way(tmp_path, monkeypatch):
    monkeypatch.setattr("kfdist.control.store.KEPT_CHANGES", 3)
    monkeypatch.setattr("kfdist.control.store.KEPT_ANSWERS", 2)
    store = Store(tmp_path / "c")
    for revision in range(1, 6):
        update = RunUpdate(record=RunRecord(name="r", revision=revision), message=b"%d" % revision)
        answer = Answer(request_id=str(revision), request_digest="d", message=b"")
        store.commit(Batch(time_ns=1, runs=(update,), answer=answer))
    try:
        assert store.changes("r", 0) == [(3, b"3"), (4, b"4"), (5, b"5")]
        assert [store.answer(str(revision)) is not None for revision in range(1, 6)] == [False] * 3 + [True] * 2
    finally:
        store.close()

"""The protos keep what was published: fields, numbers, types and calls may come, and never go or change."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from google.protobuf import descriptor_pb2

from tests.support.protos import load

FileSet = descriptor_pb2.FileDescriptorSet


@pytest.fixture(scope="module")
def rules() -> ModuleType:
    return load("compatibility")


@pytest.fixture(scope="module")
def now(rules: ModuleType, tmp_path_factory) -> FileSet:
    return rules.compiled(tmp_path_factory.mktemp("protos"))


def test_what_was_published_still_holds_and_what_came_is_published(rules: ModuleType, now: FileSet) -> None:
    assert rules.breaking(rules.published(), now) == [], "if it must be: python protos/generate.py --break"
    assert rules.PUBLISHED.read_bytes() == rules.bare(now), "run python protos/generate.py and commit what it changes"


def message(found: FileSet, name: str) -> descriptor_pb2.DescriptorProto:
    return next(each for file in found.file for each in file.message_type if each.name == name)


def drop_field(found: FileSet) -> None:
    del message(found, "Run").field[3]


def renumber(found: FileSet) -> None:
    message(found, "Run").field[3].number = 99


def rename(found: FileSet) -> None:
    message(found, "Run").field[3].name = "start"


def retype(found: FileSet) -> None:
    message(found, "Run").field[3].type = descriptor_pb2.FieldDescriptorProto.TYPE_INT32


def repeat(found: FileSet) -> None:
    message(found, "Run").field[3].label = descriptor_pb2.FieldDescriptorProto.LABEL_REPEATED


def point_elsewhere(found: FileSet) -> None:
    message(found, "GetResponse").field[0].type_name = ".kfdist.v1.Event"


def leave_oneof(found: FileSet) -> None:
    message(found, "InvertRequest").field[0].ClearField("oneof_index")


def make_presence_implicit(found: FileSet) -> None:
    message(found, "MethodSettings").field[0].ClearField("oneof_index")


def drop_message(found: FileSet) -> None:
    for file in found.file:
        kept = [each for each in file.message_type if each.name != "Event"]
        del file.message_type[:]
        file.message_type.extend(kept)


def rename_value(found: FileSet) -> None:
    file = next(file for file in found.file if file.enum_type)
    file.enum_type[0].value[1].name = "RUN_STATE_MADE"


def drop_method(found: FileSet) -> None:
    del next(file for file in found.file if file.name.endswith("run.proto")).service[0].method[0]


def stream(found: FileSet) -> None:
    next(file for file in found.file if file.name.endswith("run.proto")).service[0].method[0].server_streaming = True


def move_package(found: FileSet) -> None:
    found.file[0].package = "kfdist.v2"


def drop_file(found: FileSet) -> None:
    del found.file[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop_field, "field 4 of kfdist.v1.Run is gone"),
        (renumber, "field 4 of kfdist.v1.Run is gone"),
        (rename, "field 4 of kfdist.v1.Run was epoch, "),
        (retype, "TYPE_INT64"),
        (repeat, "LABEL_REPEATED"),
        (point_elsewhere, ".kfdist.v1.Event"),
        (leave_oneof, "no oneof"),
        (make_presence_implicit, "in _damping"),
        (drop_message, "message kfdist.v1.Event is gone"),
        (rename_value, "value 1 of kfdist.v1.RunState was RUN_STATE_CREATED and is RUN_STATE_MADE"),
        (drop_method, "service kfdist.v1.RunService/Create is gone"),
        (stream, "streams False/True"),
        (move_package, "package kfdist.v2"),
        (drop_file, "is gone"),
    ],
)
def test_what_would_break_others_is_found(
    rules: ModuleType, now: FileSet, change: Callable[[FileSet], None], words: str
) -> None:
    after = FileSet.FromString(now.SerializeToString())
    change(after)
    assert words in "\n".join(rules.breaking(now, after))


def test_what_comes_breaks_nobody(rules: ModuleType, now: FileSet) -> None:
    after = FileSet.FromString(now.SerializeToString())
    message(after, "Run").field.add(name="more", number=900, type="TYPE_INT64", label="LABEL_OPTIONAL")
    after.file[0].message_type.add(name="More")
    assert rules.breaking(now, after) == []
    assert rules.bare(now) != rules.bare(after)


def test_generating_publishes_what_came_and_refuses_what_breaks(rules: ModuleType, tmp_path: Path, monkeypatch) -> None:
    generator = load("generate")
    published = rules.published()
    monkeypatch.setattr(rules, "PUBLISHED", tmp_path / "published.binpb")
    monkeypatch.setitem(sys.modules, "compatibility", rules)
    older = FileSet.FromString(published.SerializeToString())
    drop_field(older)  # as if the field had come since
    rules.PUBLISHED.write_bytes(rules.bare(older))
    generator.publish(breaks=False)
    assert rules.PUBLISHED.read_bytes() == rules.bare(published)
    message(older, "Run").field.add(name="gone", number=901, type="TYPE_INT64", label="LABEL_OPTIONAL")
    rules.PUBLISHED.write_bytes(rules.bare(older))
    with pytest.raises(RuntimeError, match="field 901 of kfdist.v1.Run is gone.*--break"):
        generator.publish(breaks=False)
    assert rules.published() != published
    generator.publish(breaks=True)
    assert rules.published() == published

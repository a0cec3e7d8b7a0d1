"""The protos comment everything; the committed stubs are what they generate."""

from collections.abc import Iterator

import pytest
from google.protobuf import descriptor_pb2

from tests.support.protos import PROTOS, load


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[descriptor_pb2.FileDescriptorProto]:
    return list(load("compatibility").compiled(tmp_path_factory.mktemp("protos")).file)


def test_regenerating_changes_nothing(tmp_path):
    generator = load("generate")
    generator.generate(tmp_path / "made")
    assert generator.differences(tmp_path / "made", generator.GENERATED) == []
    assert len(generator.contents(tmp_path / "made")) > 3 * len(list(PROTOS.rglob("*.proto")))


def test_a_changed_stub_is_noticed(tmp_path):
    generator = load("generate")
    generator.generate(tmp_path / "made")
    path = tmp_path / "made" / "kfdist" / "v1" / "run_pb2.pyi"
    path.write_text(path.read_text() + "\n")
    assert generator.differences(tmp_path / "made", generator.GENERATED) == ["kfdist/v1/run_pb2.pyi"]


def test_numbers_are_dense_and_none_is_given_twice(files):
    for file in files:
        for message in file.message_type:
            reserved = {n for span in message.reserved_range for n in range(span.start, span.end)}
            used = [field.number for field in message.field]
            assert sorted([*used, *reserved]) == list(range(1, len(used) + len(reserved) + 1)), message.name


def test_everything_is_commented(files):
    missing = [f"{file.name}: {what}" for file in files for what in uncommented(file)]
    assert missing == []


def test_a_missing_comment_is_noticed(files):
    file = descriptor_pb2.FileDescriptorProto()
    file.CopyFrom(files[0])
    file.message_type[0].field.add(name="naked", number=99)
    assert list(uncommented(file)) == [f"{file.message_type[0].name}.naked"]


def uncommented(file: descriptor_pb2.FileDescriptorProto) -> Iterator[str]:
    """Yields whatever has no leading comment; paths are those of descriptor.proto's SourceCodeInfo."""
    commented = {
        tuple(location.path)
        for location in file.source_code_info.location
        if location.leading_comments.strip() or location.trailing_comments.strip()
    }
    if (2,) not in commented:
        yield "package"
    for i, message in enumerate(file.message_type):
        if (4, i) not in commented:
            yield message.name
        for j, field in enumerate(message.field):
            if (4, i, 2, j) not in commented:
                yield f"{message.name}.{field.name}"
        for j, oneof in enumerate(message.oneof_decl):
            synthetic = any(field.proto3_optional and field.oneof_index == j for field in message.field)
            if not synthetic and (4, i, 8, j) not in commented:
                yield f"{message.name}.{oneof.name}"
    for i, enum in enumerate(file.enum_type):
        if (5, i) not in commented:
            yield enum.name
        for j, value in enumerate(enum.value):
            if (5, i, 2, j) not in commented:
                yield f"{enum.name}.{value.name}"
    for i, service in enumerate(file.service):
        if (6, i) not in commented:
            yield service.name
        for j, method in enumerate(service.method):
            if (6, i, 2, j) not in commented:
                yield f"{service.name}.{method.name}"

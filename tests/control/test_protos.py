"""The protos keep buf's STANDARD rules and comment everything; the committed stubs are what they generate."""

import importlib.util
import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from types import ModuleType

import pytest
from google.protobuf import descriptor_pb2
from grpc_tools import protoc

PROTOS = Path(__file__).parents[2] / "protos"
WORD = "[A-Z][a-zA-Z0-9]*"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[descriptor_pb2.FileDescriptorProto]:
    target = tmp_path_factory.mktemp("descriptors") / "set.pb"
    sources = sorted(PROTOS.rglob("*.proto"))
    well_known = resources.files("grpc_tools") / "_proto"
    status = protoc.main(
        ["protoc", f"-I{PROTOS}", f"-I{well_known}", "--include_source_info", f"--descriptor_set_out={target}"]
        + [str(source) for source in sources]
    )
    assert status == 0
    found = list(descriptor_pb2.FileDescriptorSet.FromString(target.read_bytes()).file)
    assert {file.name for file in found} == {str(source.relative_to(PROTOS)) for source in sources}
    return found


def load_generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", PROTOS / "generate.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_regenerating_changes_nothing(tmp_path):
    generator = load_generator()
    generator.generate(tmp_path / "made")
    assert generator.differences(tmp_path / "made", generator.GENERATED) == []
    assert len(generator.contents(tmp_path / "made")) > 3 * len(list(PROTOS.rglob("*.proto")))


def test_a_changed_stub_is_noticed(tmp_path):
    generator = load_generator()
    generator.generate(tmp_path / "made")
    path = tmp_path / "made" / "kfdist" / "v1" / "run_pb2.pyi"
    path.write_text(path.read_text() + "\n")
    assert generator.differences(tmp_path / "made", generator.GENERATED) == ["kfdist/v1/run_pb2.pyi"]


def test_files_and_packages(files):
    for file in files:
        assert file.syntax == "proto3"
        assert re.fullmatch(r"kfdist\.v[1-9][0-9]*", file.package)  # PACKAGE_VERSION_SUFFIX
        assert Path(file.name).parent == Path(*file.package.split("."))  # PACKAGE_DIRECTORY_MATCH
        assert re.fullmatch(r"[a-z]+(_[a-z0-9]+)*\.proto", Path(file.name).name)  # FILE_LOWER_SNAKE_CASE


def test_services_have_their_own_requests_and_responses(files):
    seen: set[str] = set()
    methods = 0
    for file in files:
        for service in file.service:
            assert re.fullmatch(WORD + "Service", service.name)  # SERVICE_SUFFIX, SERVICE_PASCAL_CASE
            for method in service.method:
                methods += 1
                assert re.fullmatch(WORD, method.name)
                assert method.input_type == f".{file.package}.{method.name}Request"
                assert method.output_type == f".{file.package}.{method.name}Response"
                assert not {method.input_type, method.output_type} & seen  # RPC_REQUEST_RESPONSE_UNIQUE
                seen |= {method.input_type, method.output_type}
    assert methods == 21


def test_enums_and_names(files):
    enums = 0
    for file in files:
        for enum in file.enum_type:
            enums += 1
            prefix = re.sub(r"(?<!^)(?=[A-Z])", "_", enum.name).upper() + "_"
            assert enum.value[0].number == 0
            assert enum.value[0].name == prefix + "UNSPECIFIED"  # ENUM_ZERO_VALUE_SUFFIX
            assert all(re.fullmatch(prefix + "[A-Z0-9_]+", value.name) for value in enum.value)
        for message in file.message_type:
            assert re.fullmatch(WORD, message.name)
            for field in message.field:
                assert re.fullmatch(r"[a-z]+(_[a-z0-9]+)*", field.name)  # FIELD_LOWER_SNAKE_CASE
    assert enums == 1


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

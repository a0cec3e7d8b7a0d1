"""Holds the protos to what was published: protos/published.binpb, a FileDescriptorSet.

Programs in other languages, and processes of another version, rely on names, numbers and types. They may come, and
never go or change. `python protos/generate.py` adds what came to the file; it refuses what would break somebody, unless
it is told `--break`.
"""

from collections.abc import Iterator
from importlib import resources
from pathlib import Path

from google.protobuf import descriptor_pb2

PROTOS = Path(__file__).resolve().parent
PUBLISHED = PROTOS / "published.binpb"


def compiled(folder: Path) -> descriptor_pb2.FileDescriptorSet:
    """Compiles the protos, with their comments.

    Args:
        folder: Where to put the result on its way.

    Raises:
        RuntimeError: protoc refused them.
    """
    from grpc_tools import protoc

    well_known = resources.files("grpc_tools") / "_proto"
    target = folder / "set.binpb"
    sources = sorted(PROTOS.rglob("*.proto"))
    status = protoc.main(
        ["protoc", f"-I{PROTOS}", f"-I{well_known}", "--include_source_info", f"--descriptor_set_out={target}"]
        + [str(source) for source in sources]
    )
    if status:
        raise RuntimeError(f"protoc ended with {status}; its messages are above")
    return descriptor_pb2.FileDescriptorSet.FromString(target.read_bytes())


def published() -> descriptor_pb2.FileDescriptorSet:
    """Returns what was published."""
    return descriptor_pb2.FileDescriptorSet.FromString(PUBLISHED.read_bytes())


def bare(found: descriptor_pb2.FileDescriptorSet) -> bytes:
    """Returns the bytes to publish: without comments and places in the source."""
    copy = descriptor_pb2.FileDescriptorSet.FromString(found.SerializeToString())
    for file in copy.file:
        file.ClearField("source_code_info")
    return copy.SerializeToString(deterministic=True)


def breaking(before: descriptor_pb2.FileDescriptorSet, after: descriptor_pb2.FileDescriptorSet) -> list[str]:
    """Returns what of `before` is gone or changed in `after`, a line each."""
    had, has = dict(_facts(before)), dict(_facts(after))
    gone = [f"{what} is gone" for what in had if what not in has]
    changed = [f"{what} was {had[what]} and is {has[what]}" for what in had if what in has and has[what] != had[what]]
    return sorted(gone + changed)


def _facts(found: descriptor_pb2.FileDescriptorSet) -> Iterator[tuple[str, str]]:
    """Yields everything others rely on: its path, and what it is."""
    for file in found.file:
        yield f"file {file.name}", f"package {file.package}, {file.syntax}"
        for message in file.message_type:
            yield from _message_facts(f"{file.package}.{message.name}", message)
        for enum in file.enum_type:
            yield from _enum_facts(f"{file.package}.{enum.name}", enum)
        for service in file.service:
            name = f"service {file.package}.{service.name}"
            yield name, "a service"
            for method in service.method:
                streams = f"streams {method.client_streaming}/{method.server_streaming}"
                yield f"{name}/{method.name}", f"{method.input_type} to {method.output_type}, {streams}"


def _message_facts(name: str, message: descriptor_pb2.DescriptorProto) -> Iterator[tuple[str, str]]:
    yield f"message {name}", "a message"
    for field in message.field:
        kind = descriptor_pb2.FieldDescriptorProto.Type.Name(field.type)
        label = descriptor_pb2.FieldDescriptorProto.Label.Name(field.label)
        oneof = message.oneof_decl[field.oneof_index].name if field.HasField("oneof_index") else "no oneof"
        what = f"{field.name}, {label} {kind} {field.type_name}, json {field.json_name}, in {oneof}"
        yield f"field {field.number} of {name}", what
    for span in message.reserved_range:
        for number in range(span.start, span.end):
            yield f"field {number} of {name}", "reserved"
    for nested in message.nested_type:
        yield from _message_facts(f"{name}.{nested.name}", nested)
    for enum in message.enum_type:
        yield from _enum_facts(f"{name}.{enum.name}", enum)


def _enum_facts(name: str, enum: descriptor_pb2.EnumDescriptorProto) -> Iterator[tuple[str, str]]:
    yield f"enum {name}", "an enum"
    for value in enum.value:
        yield f"value {value.number} of {name}", value.name

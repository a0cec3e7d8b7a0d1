"""The protos keep each of the rules that buf calls STANDARD (its categories MINIMAL and BASIC among them), by name.

The list is that of buf's documentation, https://buf.build/docs/lint/rules. Each rule is shown to find a breach of it.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import PurePosixPath
from typing import Any

import pytest
from google.protobuf import descriptor_pb2

from tests.support.protos import load

Files = list[descriptor_pb2.FileDescriptorProto]

PASCAL = r"[A-Z][A-Za-z0-9]*"
SNAKE = r"[a-z][a-z0-9]*(_[a-z0-9]+)*"
UPPER = r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)*"
VERSIONED = r".+\.v[1-9][0-9]*((alpha|beta)[0-9]*)?"


def messages(files: Files) -> Iterator[descriptor_pb2.DescriptorProto]:
    waiting: list[Any] = [message for file in files for message in file.message_type]
    while waiting:
        message = waiting.pop()
        waiting += [nested for nested in message.nested_type if not nested.options.map_entry]
        yield message


def enums(files: Files) -> Iterator[descriptor_pb2.EnumDescriptorProto]:
    yield from (enum for file in files for enum in file.enum_type)
    yield from (enum for message in messages(files) for enum in message.enum_type)


def fields(files: Files) -> Iterator[descriptor_pb2.FieldDescriptorProto]:
    yield from (field for message in messages(files) for field in message.field)


def oneofs(files: Files) -> Iterator[str]:
    for message in messages(files):
        synthetic = {field.oneof_index for field in message.field if field.proto3_optional}
        yield from (each.name for index, each in enumerate(message.oneof_decl) if index not in synthetic)


def services(files: Files) -> Iterator[descriptor_pb2.ServiceDescriptorProto]:
    yield from (service for file in files for service in file.service)


def methods(files: Files) -> Iterator[descriptor_pb2.MethodDescriptorProto]:
    yield from (method for service in services(files) for method in service.method)


def unlike(pattern: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if not re.fullmatch(pattern, name)]


def prefix(enum: descriptor_pb2.EnumDescriptorProto) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", enum.name).upper() + "_"


def folder(file: descriptor_pb2.FileDescriptorProto) -> str:
    return str(PurePosixPath(file.name).parent)


def several(pairs: Iterable[tuple[str, str]]) -> list[str]:
    """Returns the keys that come with more than one value."""
    found: dict[str, set[str]] = {}
    for key, value in pairs:
        found.setdefault(key, set()).add(value)
    return [key for key, seen in found.items() if len(seen) > 1]


def unused_imports(files: Files) -> list[str]:
    by_name = {file.name: file for file in files}
    unused = []
    for file in files:
        types = " ".join([field.type_name for field in fields([file])] + [m.input_type for m in methods([file])])
        nested = " ".join(field.type_name for m in file.message_type for n in m.nested_type for field in n.field)
        for name in file.dependency:
            known = by_name[name].message_type if name in by_name else []
            package = by_name[name].package if name in by_name else "google.protobuf"
            names = [f".{package}.{message.name}" for message in known] or [f".{package}."]
            if not any(re.search(re.escape(each) + r"\b", f"{types} {nested}") for each in names):
                unused.append(f"{file.name} imports {name}")
    return unused


def cycles(files: Files) -> list[str]:
    packages = {file.name: file.package for file in files}
    arrows = {(file.package, packages.get(name, name)) for file in files for name in file.dependency}
    return [f"{a} and {b}" for a, b in arrows if a != b and (b, a) in arrows]


def same_option(name: str) -> Callable[[Files], list[str]]:
    """A rule that an option of files is one for a package."""
    return lambda files: several((file.package, str(getattr(file.options, name))) for file in files)


RULES: dict[str, Callable[[Files], list[str]]] = {
    "DIRECTORY_SAME_PACKAGE": lambda files: several((folder(file), file.package) for file in files),
    "PACKAGE_DEFINED": lambda files: [file.name for file in files if not file.package],
    "PACKAGE_DIRECTORY_MATCH": lambda files: [f.name for f in files if folder(f) != f.package.replace(".", "/")],
    "PACKAGE_NO_IMPORT_CYCLE": cycles,
    "PACKAGE_SAME_DIRECTORY": lambda files: several((file.package, folder(file)) for file in files),
    "ENUM_FIRST_VALUE_ZERO": lambda files: [enum.name for enum in enums(files) if enum.value[0].number],
    "ENUM_NO_ALLOW_ALIAS": lambda files: [enum.name for enum in enums(files) if enum.options.allow_alias],
    "ENUM_PASCAL_CASE": lambda files: unlike(PASCAL, (enum.name for enum in enums(files))),
    "ENUM_VALUE_UPPER_SNAKE_CASE": lambda files: unlike(UPPER, (v.name for e in enums(files) for v in e.value)),
    "FIELD_LOWER_SNAKE_CASE": lambda files: unlike(SNAKE, (field.name for field in fields(files))),
    "FIELD_NOT_REQUIRED": lambda files: [f.name for f in fields(files) if f.label == f.LABEL_REQUIRED],
    "IMPORT_NO_PUBLIC": lambda files: [file.name for file in files if file.public_dependency],
    "IMPORT_NO_WEAK": lambda files: [file.name for file in files if file.weak_dependency],
    "IMPORT_USED": unused_imports,
    "MESSAGE_PASCAL_CASE": lambda files: unlike(PASCAL, (message.name for message in messages(files))),
    "ONEOF_LOWER_SNAKE_CASE": lambda files: unlike(SNAKE, oneofs(files)),
    "PACKAGE_LOWER_SNAKE_CASE": lambda files: unlike(rf"{SNAKE}(\.{SNAKE})*", (file.package for file in files)),
    "PACKAGE_SAME_CSHARP_NAMESPACE": same_option("csharp_namespace"),
    "PACKAGE_SAME_GO_PACKAGE": same_option("go_package"),
    "PACKAGE_SAME_JAVA_MULTIPLE_FILES": same_option("java_multiple_files"),
    "PACKAGE_SAME_JAVA_PACKAGE": same_option("java_package"),
    "PACKAGE_SAME_PHP_NAMESPACE": same_option("php_namespace"),
    "PACKAGE_SAME_RUBY_PACKAGE": same_option("ruby_package"),
    "PACKAGE_SAME_SWIFT_PREFIX": same_option("swift_prefix"),
    "RPC_PASCAL_CASE": lambda files: unlike(PASCAL, (method.name for method in methods(files))),
    "SERVICE_PASCAL_CASE": lambda files: unlike(PASCAL, (service.name for service in services(files))),
    "SYNTAX_SPECIFIED": lambda files: [file.name for file in files if not file.syntax],
    "ENUM_VALUE_PREFIX": lambda files: [
        value.name for enum in enums(files) for value in enum.value if not value.name.startswith(prefix(enum))
    ],
    "ENUM_ZERO_VALUE_SUFFIX": lambda files: unlike(".*_UNSPECIFIED", (enum.value[0].name for enum in enums(files))),
    "FILE_LOWER_SNAKE_CASE": lambda files: unlike(rf"{SNAKE}\.proto", (PurePosixPath(f.name).name for f in files)),
    "PACKAGE_VERSION_SUFFIX": lambda files: unlike(VERSIONED, (file.package for file in files)),
    # Rules on options of protovalidate's; there are none where nothing of it is imported.
    "PROTOVALIDATE": lambda files: [f.name for f in files if any("buf/validate" in name for name in f.dependency)],
    "RPC_REQUEST_RESPONSE_UNIQUE": lambda files: several(
        (kind, method.name) for method in methods(files) for kind in (method.input_type, method.output_type)
    ),
    "RPC_REQUEST_STANDARD_NAME": lambda files: [
        method.name for method in methods(files) if not method.input_type.endswith(f".{method.name}Request")
    ],
    "RPC_RESPONSE_STANDARD_NAME": lambda files: [
        method.name for method in methods(files) if not method.output_type.endswith(f".{method.name}Response")
    ],
    "SERVICE_SUFFIX": lambda files: unlike(".+Service", (service.name for service in services(files))),
}

BREACHES: dict[str, tuple[str, Any]] = {
    "DIRECTORY_SAME_PACKAGE": ("package", "kfdist.v2"),
    "PACKAGE_DEFINED": ("package", ""),
    "PACKAGE_DIRECTORY_MATCH": ("name", "elsewhere/run.proto"),
    "PACKAGE_SAME_DIRECTORY": ("name", "elsewhere/run.proto"),
    "ENUM_FIRST_VALUE_ZERO": ("enum_type[0].value[0].number", 1),
    "ENUM_NO_ALLOW_ALIAS": ("enum_type[0].options.allow_alias", True),
    "ENUM_PASCAL_CASE": ("enum_type[0].name", "run_state"),
    "ENUM_VALUE_UPPER_SNAKE_CASE": ("enum_type[0].value[1].name", "RUN_STATE_Made"),
    "FIELD_LOWER_SNAKE_CASE": ("message_type[0].field[0].name", "someName"),
    "FIELD_NOT_REQUIRED": ("message_type[0].field[0].label", descriptor_pb2.FieldDescriptorProto.LABEL_REQUIRED),
    "MESSAGE_PASCAL_CASE": ("message_type[0].name", "some_message"),
    "PACKAGE_LOWER_SNAKE_CASE": ("package", "kfDist.v1"),
    "PACKAGE_SAME_CSHARP_NAMESPACE": ("options.csharp_namespace", "other"),
    "PACKAGE_SAME_GO_PACKAGE": ("options.go_package", "other"),
    "PACKAGE_SAME_JAVA_MULTIPLE_FILES": ("options.java_multiple_files", True),
    "PACKAGE_SAME_JAVA_PACKAGE": ("options.java_package", "other"),
    "PACKAGE_SAME_PHP_NAMESPACE": ("options.php_namespace", "other"),
    "PACKAGE_SAME_RUBY_PACKAGE": ("options.ruby_package", "other"),
    "PACKAGE_SAME_SWIFT_PREFIX": ("options.swift_prefix", "other"),
    "RPC_PASCAL_CASE": ("service[0].method[0].name", "make_run"),
    "SERVICE_PASCAL_CASE": ("service[0].name", "run_Service"),
    "SYNTAX_SPECIFIED": ("syntax", ""),
    "ENUM_VALUE_PREFIX": ("enum_type[0].value[1].name", "CREATED"),
    "ENUM_ZERO_VALUE_SUFFIX": ("enum_type[0].value[0].name", "RUN_STATE_NONE"),
    "FILE_LOWER_SNAKE_CASE": ("name", "kfdist/v1/Run.proto"),
    "PACKAGE_VERSION_SUFFIX": ("package", "kfdist"),
    "RPC_REQUEST_RESPONSE_UNIQUE": ("service[0].method[0].input_type", ".kfdist.v1.GetRequest"),
    "RPC_REQUEST_STANDARD_NAME": ("service[0].method[0].input_type", ".kfdist.v1.MakeRequest"),
    "RPC_RESPONSE_STANDARD_NAME": ("service[0].method[0].output_type", ".kfdist.v1.Run"),
    "SERVICE_SUFFIX": ("service[0].name", "Runs"),
}
"""By rule, a field of run.proto's descriptor and a value that breaks the rule there."""


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Files:
    return list(load("compatibility").compiled(tmp_path_factory.mktemp("protos")).file)


@pytest.mark.parametrize("rule", RULES)
def test_the_protos_keep_it(files: Files, rule: str) -> None:
    assert RULES[rule](files) == []


def changed(files: Files, change: Callable[[Any], None]) -> Files:
    """Returns copies of the files, run.proto's changed."""
    copies = [descriptor_pb2.FileDescriptorProto.FromString(file.SerializeToString()) for file in files]
    change(next(file for file in copies if file.name == "kfdist/v1/run.proto"))
    return copies


def put(place: str, value: Any) -> Callable[[Any], None]:
    def change(file: Any) -> None:
        *path, last = place.replace("[", ".").replace("]", "").split(".")
        for part in path:
            file = file[int(part)] if part.isdigit() else getattr(file, part)
        setattr(file, last, value)

    return change


@pytest.mark.parametrize("rule", BREACHES)
def test_a_breach_is_found(files: Files, rule: str) -> None:
    assert RULES[rule](changed(files, put(*BREACHES[rule])))


BREACHES_OF_LISTS: dict[str, Callable[[Any], Any]] = {
    "PACKAGE_NO_IMPORT_CYCLE": lambda file: (
        setattr(file, "package", "kfdist.v2"),
        file.dependency.append("kfdist/v1/inversion.proto"),
    ),
    "IMPORT_NO_PUBLIC": lambda file: file.public_dependency.append(0),
    "IMPORT_NO_WEAK": lambda file: file.weak_dependency.append(0),
    "IMPORT_USED": lambda file: file.dependency.append("kfdist/v1/inversion.proto"),
    "ONEOF_LOWER_SNAKE_CASE": lambda file: file.message_type[0].oneof_decl.add(name="someOne"),
    "PROTOVALIDATE": lambda file: file.dependency.append("buf/validate/validate.proto"),
}


@pytest.mark.parametrize("rule", BREACHES_OF_LISTS)
def test_a_breach_in_a_list_is_found(files: Files, rule: str) -> None:
    broken = changed(files, BREACHES_OF_LISTS[rule])
    if rule == "PACKAGE_NO_IMPORT_CYCLE":
        next(file for file in broken if file.name == "kfdist/v1/inversion.proto").dependency.append(
            "kfdist/v1/run.proto"
        )
    assert RULES[rule](broken)


def test_no_rule_is_without_a_breach() -> None:
    assert RULES.keys() == BREACHES.keys() | BREACHES_OF_LISTS.keys()

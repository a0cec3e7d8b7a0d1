"""Makes kfdist/rpc/_generated from the protos: messages, their types, the gRPC stubs, and a copy of the protos.

Run `python protos/generate.py` after changing a proto and commit the result; `--check` changes nothing and exits with 1
if the committed files differ. The copies of the protos make them part of the wheel. What came to the protos is added to
protos/published.binpb, and what would break others' programs is refused (`compatibility.py`).

protoc writes imports by the proto package (`from kfdist.v1 import run_pb2`), which is no Python package: the stubs live
in kfdist/rpc/_generated. So the imports are rewritten; the names of the protos, which other languages see, stay.
"""

import argparse
import importlib.metadata
import re
import shutil
import sys
import tempfile
from importlib import resources
from pathlib import Path

PINNED_VERSION = "1.85.1"
"""The version of grpcio-tools that makes the committed files; others make different ones."""

PROTOS = Path(__file__).resolve().parent
GENERATED = PROTOS.parent / "kfdist" / "rpc" / "_generated"
PACKAGE = "kfdist.rpc._generated"

_IMPORT = re.compile(r"^(from|import) (kfdist\.v1)\b", re.MULTILINE)


def generate(target: Path) -> None:
    """Writes the whole generated package to `target`.

    Args:
        target: Folder to write to; it must be empty or absent.

    Raises:
        RuntimeError: grpcio-tools is of another version than the pinned one, or protoc refused the protos.
    """
    found = importlib.metadata.version("grpcio-tools")
    if found != PINNED_VERSION:
        raise RuntimeError(
            f"grpcio-tools is {found}; the committed files are made by {PINNED_VERSION}: install that one"
        )
    from grpc_tools import protoc  # after the version is known to be right

    target.mkdir(parents=True, exist_ok=True)
    sources = sorted(PROTOS.rglob("*.proto"))
    well_known = resources.files("grpc_tools") / "_proto"
    status = protoc.main(
        ["protoc", f"-I{PROTOS}", f"-I{well_known}"]
        + [f"--{kind}_out={target}" for kind in ("python", "pyi", "grpc_python")]
        + [str(source) for source in sources]
    )
    if status:
        raise RuntimeError(f"protoc ended with {status}; its messages are above")
    for source in sources:
        shutil.copyfile(source, target / source.relative_to(PROTOS))
    for made in [*target.rglob("*.py"), *target.rglob("*.pyi")]:
        made.write_text(_IMPORT.sub(rf"\1 {PACKAGE}.\2", made.read_text()))
    for folder in [target, *(path for path in target.rglob("*") if path.is_dir())]:
        (folder / "__init__.py").write_text('"""Made by protos/generate.py; do not edit."""\n')


def contents(folder: Path) -> dict[str, bytes]:
    """Returns the bytes of every file under `folder` by relative path, compiled Python aside."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }


def differences(made: Path, committed: Path) -> list[str]:
    """Returns the relative paths at which two folders differ."""
    new, old = contents(made), contents(committed)
    return sorted(path for path in new.keys() | old.keys() if new.get(path) != old.get(path))


def publish(*, breaks: bool) -> None:
    """Adds what came to the published descriptors.

    Args:
        breaks: Whether what was published may go or change, too.

    Raises:
        RuntimeError: It would, and may not.
    """
    import compatibility  # beside this script

    with tempfile.TemporaryDirectory() as folder:
        now = compatibility.compiled(Path(folder))
    broken = compatibility.breaking(compatibility.published(), now) if compatibility.PUBLISHED.exists() else []
    if broken and not breaks:
        raise RuntimeError(
            "this would break programs of others: " + "; ".join(broken) + ". Reserve what isn't needed any more, add "
            "what is new beside it; if it must be, run this with --break"
        )
    compatibility.PUBLISHED.write_bytes(compatibility.bare(now))


def main() -> int:
    """Generates, or checks what is committed; returns the exit status."""
    parser = argparse.ArgumentParser(description="Makes kfdist/rpc/_generated from the protos.")
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit with 1 if the committed files differ"
    )
    parser.add_argument("--break", dest="breaks", action="store_true", help="publish also what breaks others' programs")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "_generated"
        generate(made)
        changed = differences(made, GENERATED)
        if arguments.check:
            for path in changed:
                print(f"{GENERATED / path} is not what the protos say; run python protos/generate.py")
            return 1 if changed else 0
        if changed:
            shutil.rmtree(GENERATED, ignore_errors=True)
            shutil.copytree(made, GENERATED)
        print(f"{len(changed)} files changed in {GENERATED}")
    publish(breaks=arguments.breaks)
    return 0


if __name__ == "__main__":
    sys.exit(main())

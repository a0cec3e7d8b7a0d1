"""Where Ray Train may keep its copies, and what is told of places where it can't."""

import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from kfdist.errors import ConfigError, EnvironmentFault
from kfdist.launch.submission import storage
from kfdist.launch.submission.storage import parse_storage, prepare_storage


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ("/data/kept", "/data/kept"),
        ("file:///data/kept%20here", "/data/kept here"),
        ("s3://bucket/path?region=x", "s3://bucket/path?region=x"),
        ("abfs://container@account.dfs.core.windows.net/x", "abfs://container@account.dfs.core.windows.net/x"),
        ("hdfs://user@host:8020/x@y", "hdfs://user@host:8020/x@y"),
    ],
)
def test_directories_and_uris_are_taken(given: str, taken: str):
    assert parse_storage(given) == taken


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("kept", "is 'kept'; give an absolute path"),
        ("", "is ''; give an absolute path"),
        ("file://data/kept", "names the host 'data'; write the directory, or file:///DIR"),
        ("http://host/x", "can't write to 'http'; give a directory that all nodes share, or a URI that begins with"),
        ("gs://", r"is 'gs://', which names no place; such as gs://BUCKET/PATH"),
        ("s3:///path", "names no place"),
    ],
)
def test_what_is_neither_is_refused(given: str, told: str):
    with pytest.raises(ConfigError, match=told) as caught:
        parse_storage(given)
    assert caught.value.path == "--storage"


@pytest.mark.parametrize(
    "given",
    [
        "s3://AKIA:s3kr1t@bucket/path",
        "s3://AKIA:half/s3kr1t@bucket/path",
        "http://user:s3kr1t@host/x",
        "s3://bucket/path?secret_key=s3kr1t",
        "abfss://container@account/x?region=a&sig=s3kr1t",
        "gs://bucket?Access-Token=s3kr1t",
    ],
)
def test_a_secret_in_a_uri_is_refused_and_not_shown(given: str):
    with pytest.raises(ConfigError, match="has a secret in it") as caught:
        parse_storage(given)
    assert "s3kr1t" not in str(caught.value)


def test_a_run_has_one_mark_in_a_directory(tmp_path: Path):
    place, asked = str(tmp_path / "storage"), threading.Event()
    other = Path(prepare_storage(place, "other", asked))
    first, second = (Path(prepare_storage(place, "run", asked)) for _ in range(2))
    assert second.exists() and not first.exists() and other.exists()


def test_a_directory_that_cannot_be_written_is_told(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentFault, match=r"can't keep checkpoints in .*file/storage \(.*\); choose another --st"):
        prepare_storage(str(tmp_path / "file" / "storage"), "run", threading.Event())


@pytest.fixture
def made(monkeypatch) -> Iterator[list[str]]:
    """The directories made in a storage at s3://, which fails at s3://foreign and doesn't answer at s3://far."""
    made: list[str] = []

    def create(path: str) -> None:
        if path.startswith("foreign"):
            raise OSError("access denied\nand a stack of details")
        if path.startswith("far"):
            never.wait(30)
        made.append(path)

    def from_uri(uri: str) -> tuple[SimpleNamespace, str]:
        return SimpleNamespace(create_dir=create), uri.removeprefix("s3://")

    never = threading.Event()
    system = SimpleNamespace(FileSystem=SimpleNamespace(from_uri=from_uri))
    monkeypatch.setitem(sys.modules, "pyarrow", SimpleNamespace(fs=system))
    monkeypatch.setattr(storage, "_TICK_SECONDS", 0.01)
    yield made
    never.set()


def test_the_place_in_a_uri_is_made_or_the_reason_told(made: list[str], monkeypatch):
    asked = threading.Event()
    assert prepare_storage("s3://bucket/path", "run", asked) == ""
    assert made == ["bucket/path/run"]
    with pytest.raises(EnvironmentFault, match=r"in s3://foreign \(access denied\); choose another --storage"):
        prepare_storage("s3://foreign", "run", asked)
    monkeypatch.setattr(storage, "_ANSWER_SECONDS", 0.3)
    with pytest.raises(EnvironmentFault, match=r"in s3://far \(no answer in 0.3 s\)"):
        prepare_storage("s3://far", "run", asked)
    asked.set()
    assert prepare_storage("s3://far", "run", asked) == ""  # whoever wants to stop waits for nothing

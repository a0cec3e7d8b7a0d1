"""Every message: the field, the value received, what is allowed, what to do."""

import re
from pathlib import Path

import pytest

from kfdist.config import load_config
from kfdist.errors import ConfigError

# What is set, the path the error names, and words its message must have.
BAD = [
    # unknown keys
    ("run.stepz=3", "run.stepz", ["unknown key", "did you mean 'steps'", "[run] has: name"]),
    ("rum.steps=3", "rum", ["unknown key", "did you mean 'run'"]),
    ("run.damping=3", "run.damping", ["did you mean 'preconditioner.damping'"]),
    ("run.zzz=3", "run.zzz", ["unknown key; [run] has: name, dir"]),
    ("preconditioner.staleness.soft_bund=30", "preconditioner.staleness.soft_bund", ["did you mean 'soft_bound'"]),
    # types
    ("run.steps=abc", "run.steps", ["is 'abc', a string", "an integer"]),
    ("run.steps=1.5", "run.steps", ["is 1.5, a float", "an integer"]),
    ("run.seed=true", "run.seed", ["is true, a boolean", "an integer"]),
    ("run.seed=2026-01-31", "run.seed", ["is 2026-01-31, a date", "an integer"]),
    ("optimizer.lr=true", "optimizer.lr", ["is true", "a number"]),
    ('data.batch_size="4"', "data.batch_size", ["is '4', a string", "an integer"]),
    ("preconditioner.skip=3", "preconditioner.skip", ["is 3", "a list"]),
    ("preconditioner.skip=[3]", "preconditioner.skip[0]", ["is 3", "a string"]),
    ("preconditioner.settings.rank={a={b=1}}", "preconditioner.settings.rank", ["a table", "a number, a string"]),
    ("preconditioner.staleness=3", "preconditioner.staleness", ["is 3", "a table"]),
    # names of files
    ('run.dir="a\\u0000b"', "run.dir", ["is 'a\\x00b'", "no NUL", "the run directory"]),
    (f"run.dir=runs/{'x' * 300}", "run.dir", ["xxxx... has 300 bytes", "at most 255"]),
    (f"control.database={'ä' * 128}", "control.database", ["ääää... has 256 bytes", "at most 255"]),
    ("run.dir=w\udcff", "run.dir", ["is 'w\\udcff'", "text in UTF-8"]),
    # ranges
    ("preconditioner.damping=0", "preconditioner.damping", ["is 0", "greater than 0", "lambda"]),
    ("preconditioner.damping=-1.0", "preconditioner.damping", ["is -1.0", "greater than 0"]),
    ("preconditioner.damping=nan", "preconditioner.damping", ["is nan", "finite"]),
    ("preconditioner.damping=inf", "preconditioner.damping", ["is inf", "finite"]),
    ("preconditioner.ema_decay=1.0", "preconditioner.ema_decay", ["is 1.0", "less than 1"]),
    ("preconditioner.positions_budget=0", "preconditioner.positions_budget", ["is 0", "at least 1", "positions"]),
    ("preconditioner.damping_decay=1.1", "preconditioner.damping_decay", ["is 1.1", "at most 1", "multiplies"]),
    ("preconditioner.kl_clip_epochs=[[25, -1]]", "preconditioner.kl_clip_epochs[0][1]", ["is -1", "greater than 0"]),
    ("preconditioner.kl_clip_epochs=[[25, 1]]", "preconditioner.kl_clip_epochs", ["graft's", "leave it out"]),
    ("preconditioner.damping_epochs=[[25, -1]]", "preconditioner.damping_epochs[0][1]", ["is -1", "greater than 0"]),
    ("preconditioner.damping_epochs=[[9, 1], [5, 1]]", "preconditioner.damping_epochs", ["[9, 1]", "epochs must rise"]),
    ("cluster.workers=0", "cluster.workers", ["is 0", "at least 1"]),
    ("cluster.owners=-1", "cluster.owners", ["is -1", "at least 0"]),
    ("cluster.threads=0", "cluster.threads", ["is 0", "at least 1"]),
    ("cluster.job_deadline_seconds=1e5", "cluster.job_deadline_seconds", ["is 100000.0", "at most 86400", "killed"]),
    ("cluster.group_timeout_seconds=1e15", "cluster.group_timeout_seconds", ["at most 100000000", "collective"]),
    ("cluster.bundle.cpus=0", "cluster.bundle.cpus", ["is 0", "greater than 0", "CPUs of each owner"]),
    ("cluster.bundle.gpus=2", "cluster.bundle.gpus", ["is 2", "at most 1", "share of a GPU"]),
    ("cluster.bundle.resources.slow=0", "cluster.bundle.resources.slow", ["is 0", "greater than 0"]),
    ("cluster.bundle.resources.GPU=1", "cluster.bundle.resources", ["names GPU", "write cluster.bundle.gpus"]),
    ("cluster.bundle.resources.memory=1e9", "cluster.bundle.resources", ["names memory", "another name"]),
    ("cluster.bundle.labels.zone=!bad value", "cluster.bundle.labels.zone", ["is '!bad value'", "in(A100, H100)"]),
    ("cluster.bundle.labels.zone=3", "cluster.bundle.labels.zone", ["is 3", "a string"]),
    ("cluster.owner_ports=[7, 0]", "cluster.owner_ports[1]", ["is 0", "at least 1", "for firewalls"]),
    ("cluster.owner_ports=[9000, 8000]", "cluster.owner_ports", ["is [9000, 8000]", "the first port, then the last"]),
    ("cluster.owner_ports=[9000]", "cluster.owner_ports[1]", ["missing"]),
    ("cluster.bundle.cpu=1", "cluster.bundle.cpu", ["unknown key", "did you mean 'cpus'"]),
    ("run.steps=0", "run.steps", ["is 0", "at least 1"]),
    ("checkpoint.keep=0", "checkpoint.keep", ["is 0", "at least 1"]),
    # choices
    ("preconditioner.adoption=fixedlag", "preconditioner.adoption", ["'fixedlag'", "did you mean 'fixed-lag'"]),
    ("cluster.assignment=lptt", "cluster.assignment", ["did you mean 'lpt'", "round_robin"]),
    ("cluster.link=socket", "cluster.link", ["'service' or 'local'"]),
    ("preconditioner.fisher=monte-carlo", "preconditioner.fisher", ["'empirical', 'mc' or 'exact'"]),
    ("preconditioner.weight_sharing=expnd", "preconditioner.weight_sharing", ["did you mean 'expand'"]),
    ("checkpoint.statistics=fold", "checkpoint.statistics", ["'per-rank' or 'folded'"]),
    # combinations
    ("cluster.owners=0", "cluster.owners", ['link = "service" needs at least 1', 'method = "none" needs none']),
    (
        "preconditioner.inverse_period=17",
        "preconditioner.inverse_period",
        ["is 17", "no multiple", "take 10 or 20"],
    ),
    ("preconditioner.lag=3", "preconditioner.lag", ["is 3", "fixed-lag"]),
    ("preconditioner.adoption=fixed-lag", "preconditioner.lag", ["is missing", "lag = 5"]),
    ("optimizer.schedule=step", "optimizer.milestones", ["give both or neither"]),
    ("optimizer.milestones=[3]", "optimizer.milestones", ["is [3]", "give both or neither"]),
    # a table of methods
    ("preconditioner.methods=kfac", "preconditioner.methods", ["is 'kfac', a string", "a table"]),
    ("preconditioner.methods={}", "preconditioner.methods", ["is {}", "at least one pattern"]),
    ("preconditioner.methods.head=3", "preconditioner.methods.head", ["is 3", "a method's name, or a table"]),
    ("preconditioner.methods.head={rank = 3}", "preconditioner.methods.head.method", ["is missing"]),
    ("preconditioner.methods.head={method = 3}", "preconditioner.methods.head.method", ["is 3"]),
    ("preconditioner.methods.head=none", "preconditioner.methods.head.method", ['is "none"', "preconditioner.skip"]),
    (
        'preconditioner.methods={"a.*" = {method = "kfac", rank = {b = {c = 1}}}}',
        'preconditioner.methods."a.*".rank',
        ["a table", "a number, a string", "[from --set]"],
    ),
    # names and addresses
    ("run.name=../x", "run.name", ["is '../x'", "1 to 63 of a-z 0-9"]),
    ("run.name=A", "run.name", ["is 'A'"]),
    ('run.name=""', "run.name", ["is ''"]),
    ("control.address=7070", "control.address", ["is 7070", "a string"]),
    ("control.address=localhost", "control.address", ["'localhost'", "host:port"]),
    ("control.address=127.0.0.1:99999", "control.address", ["0 to 65535"]),
    ("control.address=::1:70", "control.address", ["in brackets"]),
    ("control.address=0.0.0.0:70", "control.address", ["is '0.0.0.0:70'", "kfdist certs init", "loopback", "SSH"]),
    ("control.metrics_address=10.0.0.1:70", "control.metrics_address", ["security.certificates"]),
    ("cluster.owner_address=node", "cluster.owner_address", ['is "node"', "needs TLS and a token"]),
    ("security.token_file=t", "security.token_file", ["is 't'", "security.certificates is missing"]),
    ("cluster.ray=somewhere", "cluster.ray", ["is 'somewhere'", '"local"', '"auto"']),
    # the syntax of --set
    ("steps", "--set", ["is 'steps'", "section.key=value"]),
    ("run=3", "--set", ["is 'run=3'", "section.key=value"]),
    ("run..steps=3", "--set", ["section.key=value"]),
]


@pytest.mark.parametrize(("override", "path", "words"), BAD, ids=[case[0] for case in BAD])
def test_one_bad_value(override: str, path: str, words: list[str]):
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides=[override], environment={})
    assert caught.value.path == path
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert [word for word in words if word not in message] == []


@pytest.mark.parametrize("field", ["certificates", "token_file"])
def test_a_secret_in_the_place_of_its_file_is_not_shown(certificates: Path, field: str):
    for file in ("client.pem", "token"):
        secret = (certificates / file).read_text()
        with pytest.raises(ConfigError, match=f"security.{field}: looks like a secret itself") as caught:
            load_config(None, environment={f"KFDIST_SECURITY__{field.upper()}": secret})
        assert not any(line in str(caught.value) for line in secret.split())


@pytest.mark.parametrize(
    "name", ["certificates-of-the-production-cluster-in-zurich", "Certs_of_eu1_cluster_PROD_and_TEST_2026"]
)
def test_a_long_name_of_words_is_no_secret(name: str):
    config = load_config(None, overrides=[f"security.certificates={name}"], environment={})
    assert str(config.security.certificates).endswith(name)


@pytest.mark.parametrize(
    ("overrides", "path", "words"),
    [
        (
            ["preconditioner.inverse_period_epochs=[[5, 3]]"],
            "preconditioner.inverse_period",
            ["is 3, which is no multiple of factor_period"],
        ),
        (
            ["preconditioner.inverse_period_epochs=[[5, 20]]", "preconditioner.staleness.hard_bound=13"],
            "preconditioner.staleness.hard_bound",
            ["is 13", "smallest legal value is 21"],
        ),
        (
            ["preconditioner.damping_epochs=[[5, 0.1]]", "preconditioner.damping_decay=0.9"],
            "preconditioner.damping_decay",
            ["is 0.9", "damping_epochs is given too", "one of them"],
        ),
        (["run.steps=3", "run.epochs=2"], "run.steps", ["both are given"]),
        (
            ["run.stop_at_target=true", "run.eval_period=5"],
            "run.stop_at_target",
            ["is true", "no run.target_accuracy", "give one"],
        ),
        (
            ["run.stop_at_target=true", "run.target_accuracy=0.9"],
            "run.stop_at_target",
            ["is true", "evaluated at its end alone", "run.eval_period or run.eval_epochs"],
        ),
        (
            ["preconditioner.method=kfac", "preconditioner.methods.head=kfac"],
            "preconditioner.methods",
            ["both are given", "give preconditioner.method or"],
        ),
        (
            ["preconditioner.methods.head=kfac", "preconditioner.settings.rank=3"],
            "preconditioner.settings",
            ["{'rank': 3}", "beside each `method`"],
        ),
        (
            ["preconditioner.staleness.soft_bound=10"],
            "preconditioner.staleness.soft_bound",
            ["is 10", "smallest legal value is 11"],
        ),
        (
            ["preconditioner.staleness.hard_bound=2"],
            "preconditioner.staleness.hard_bound",
            ["is 2", "smallest legal value is 11"],
        ),
        (
            ["preconditioner.staleness.soft_bound=30", "preconditioner.staleness.hard_bound=20"],
            "preconditioner.staleness.soft_bound",
            ["is 30", "hard_bound = 20"],
        ),
        (
            ["preconditioner.staleness.hard_bound=50", "preconditioner.adoption=fixed-lag", "preconditioner.lag=4"],
            "preconditioner.staleness.hard_bound",
            ["is 50", "at most 13 steps", "remove the bound"],
        ),
        (["optimizer.schedule=step", "optimizer.milestones=[5, 3]"], "optimizer.milestones", ["[5, 3]", "must rise"]),
    ],
)
def test_values_that_do_not_go_together(overrides: list[str], path: str, words: list[str]):
    # inverse_period + the smallest delay - 1 is 11.
    periods = ["preconditioner.factor_period=2", "preconditioner.inverse_period=10"]
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides=[*periods, *overrides], environment={})
    assert caught.value.path == path
    assert [word for word in words if word not in str(caught.value)] == []


def test_the_smallest_legal_bound_is_accepted():
    overrides = ["preconditioner.inverse_period=10", "preconditioner.staleness.hard_bound=11"]
    assert load_config(None, overrides=overrides, environment={}).preconditioner.staleness.hard_bound == 11


def test_all_mistakes_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides=["run.stepz=3", "cluster.workers=0", "data.nam=x"], environment={})
    assert re.findall(r"^[a-z.]+:", str(caught.value), re.MULTILINE) == ["run.stepz:", "data.nam:", "cluster.workers:"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["no such file"]),
        (b"[run\n", ["isn't valid TOML", "line 1", "mend the line"]),
        (b"[run]\nname = '\xff'\n", ["isn't UTF-8", "byte 14", "save it as UTF-8"]),
        pytest.param(b"run.steps = " + b"9" * 5000, ["isn't valid TOML", "4300 digits"], id="digits"),
        pytest.param(b"run.steps = " + b"[" * 100_000, ["isn't valid TOML", "recursion"], id="brackets"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, content: bytes | None, words: list[str]):
    path = tmp_path / "run.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(path, environment={})
    assert caught.value.path == str(path)
    assert [word for word in words if word not in str(caught.value)] == []


def test_the_mark_that_some_editors_begin_utf8_with_is_no_mistake(tmp_path: Path):
    path = tmp_path / "run.toml"
    path.write_bytes(b"\xef\xbb\xbf[run]\nsteps = 7\n")
    assert load_config(path, environment={}).run.steps == 7


def test_a_directory_is_no_file(tmp_path: Path):
    with pytest.raises(ConfigError, match="can't be read"):
        load_config(tmp_path, environment={})


def test_a_name_that_no_file_has_is_told(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"can't be read \(File name too long\)"):
        load_config(tmp_path / ("x" * 300), environment={})


def test_a_section_must_be_a_table(tmp_path: Path):
    path = tmp_path / "run.toml"
    path.write_text("run = 3\n")
    with pytest.raises(ConfigError, match=r"^run: is 3, an integer; it must be a table") as caught:
        load_config(path, environment={})
    assert caught.value.path == "run"


def test_a_value_in_the_place_of_a_section_is_named(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('optimizer = "adam"\n')
    with pytest.raises(ConfigError, match="optimizer.*'adam'|'adam'.*optimizer"):
        load_config(file, environment={})

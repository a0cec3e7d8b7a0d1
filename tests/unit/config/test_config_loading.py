"""Where values come from: defaults, file, environment, command line; and back to TOML."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kfdist.config import Config, SecuritySection, config_from_table, load_config, security_from_environment, to_toml
from kfdist.config.toml import format_table, parse_value
from kfdist.errors import ConfigError


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_without_a_file_it_is_the_digits_run():
    config = load_config(None, environment={})
    assert config == Config()
    assert (config.model.name, config.data.name, config.cluster.workers, config.cluster.owners) == (
        "digits-cnn",
        "digits",
        2,
        2,
    )


def test_each_layer_replaces_the_one_below(tmp_path: Path):
    file = write(tmp_path / "run.toml", "[optimizer]\nlr = 0.2\nmomentum = 0.5\nweight_decay = 0.25\n")
    config = load_config(
        file,
        environment={"KFDIST_OPTIMIZER__MOMENTUM": "0.6", "KFDIST_OPTIMIZER__WEIGHT_DECAY": "0.125", "PATH": "/bin"},
        overrides=["optimizer.weight_decay=0.0625"],
    )
    assert (config.optimizer.lr, config.optimizer.momentum, config.optimizer.weight_decay) == (0.2, 0.6, 0.0625)
    assert config.data == Config().data


@pytest.mark.parametrize("higher", ["file", "environment", "command line"])
def test_a_higher_layers_epochs_replace_the_lower_ones_steps(tmp_path: Path, higher: str):
    file = write(tmp_path / "run.toml", "[run]\nepochs = 3\n" if higher == "file" else "[run]\nsteps = 7\n")
    environment = {"KFDIST_RUN__EPOCHS": "3"} if higher == "environment" else {}
    overrides = ["run.epochs=3"] if higher == "command line" else []
    config = load_config(file, environment=environment, overrides=overrides)
    assert (config.run.steps, config.run.epochs) == (None, 3)


def test_naming_another_method_drops_the_settings_of_the_old_one(tmp_path: Path):
    assert load_config(None, environment={}, overrides=["preconditioner.method=kfac"]).preconditioner.settings == {}
    file = write(tmp_path / "run.toml", '[preconditioner]\nmethod = "rs-kfac"\n[preconditioner.settings]\nrank = 7\n')
    kept = load_config(file, environment={}, overrides=["preconditioner.damping=0.5"])
    assert kept.preconditioner.settings == {"rank": 7}


METHODS = """
[preconditioner.methods]
head = { method = "kfac", damping_rule = "relative" }
"conv*" = "rs-kfac"
"a.*" = { method = "sre-kfac", rank_schedule = [[0, 5], [9, 7]] }
"*" = "auto"
"""


def test_a_table_of_methods_replaces_the_method_of_a_lower_layer(tmp_path: Path):
    section = load_config(write(tmp_path / "run.toml", METHODS), environment={}).preconditioner
    assert (section.method, section.settings) == (None, {})
    assert list((section.methods or {}).items()) == [
        ("head", {"method": "kfac", "damping_rule": "relative"}),
        ("conv*", {"method": "rs-kfac"}),
        ("a.*", {"method": "sre-kfac", "rank_schedule": [[0, 5], [9, 7]]}),
        ("*", {"method": "auto"}),
    ]
    assert section.described == "head: kfac, conv*: rs-kfac, a.*: sre-kfac, *: auto"


def test_the_order_of_methods_survives_being_written(tmp_path: Path):
    config = load_config(write(tmp_path / "run.toml", METHODS), environment={})
    again = load_config(write(tmp_path / "config.toml", to_toml(config)), environment={})
    assert again == config
    assert list(again.preconditioner.methods or {}) == ["head", "conv*", "a.*", "*"]


def test_a_higher_layers_methods_replace_the_lower_ones_as_a_whole(tmp_path: Path):
    """Merged one by one, a pattern from above would come after the "*" from below, and never match."""
    file = write(tmp_path / "run.toml", METHODS)
    overrides = ["preconditioner.methods.head=rs-kfac", "preconditioner.methods.conv*=kfac"]
    section = load_config(file, environment={}, overrides=overrides).preconditioner
    assert section.methods == {"head": {"method": "rs-kfac"}, "conv*": {"method": "kfac"}}
    variable = {"KFDIST_PRECONDITIONER__METHODS": '{"*" = "kfac"}'}
    assert load_config(file, environment=variable).preconditioner.methods == {"*": {"method": "kfac"}}


@pytest.mark.parametrize("method", ["auto", "kfac", "none"])
def test_a_method_from_above_replaces_the_methods_from_below(tmp_path: Path, method: str):
    overrides = [f"preconditioner.method={method}", "cluster.link=local"]
    section = load_config(write(tmp_path / "run.toml", METHODS), environment={}, overrides=overrides).preconditioner
    assert (section.method, section.methods, section.settings) == (method, None, {})
    assert section.described == method


def test_asap_from_above_drops_the_lag_from_below(tmp_path: Path):
    file = write(tmp_path / "run.toml", '[preconditioner]\nadoption = "fixed-lag"\nlag = 5\n')
    assert load_config(file, environment={}).preconditioner.lag == 5
    assert load_config(file, environment={}, overrides=["preconditioner.adoption=asap"]).preconditioner.lag is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("-1e-3", -1e-3),
        ("true", True),
        ('"3"', "3"),
        ('["a", "b"]', ["a", "b"]),
        ("sgd", "sgd"),
        ("127.0.0.1:70", "127.0.0.1:70"),
        ("1\nb = 2", "1\nb = 2"),
        ("", ""),
        ("nan,", "nan,"),
        pytest.param("9" * 5000, "9" * 5000, id="digits"),
        pytest.param("[" * 100_000, "[" * 100_000, id="brackets"),
    ],
)
def test_values_are_toml_and_else_strings(text: str, value: object):
    assert parse_value(text) == value
    assert type(parse_value(text)) is type(value)


def test_variables_without_a_section_belong_to_others():
    assert load_config(None, environment={"KFDIST_DEBUG": "1", "KFDIST_PARENT_PID": "3"}) == Config()


def test_the_message_names_the_layer_a_wrong_value_came_from(tmp_path: Path):
    file = write(tmp_path / "run.toml", "[run]\nseed = -1\n")
    with pytest.raises(ConfigError, match=r"^run\.seed: is -1; .*run\.toml\]$"):
        load_config(file, environment={})
    with pytest.raises(ConfigError, match=r"\[from KFDIST_RUN__SEED\]$"):
        load_config(file, environment={"KFDIST_RUN__SEED": "-2"})


settings = st.dictionaries(
    st.text(min_size=1, max_size=8),
    st.one_of(st.booleans(), st.integers(-(2**62), 2**62), st.floats(allow_nan=False), st.text(), st.just([1, "a"])),
    max_size=3,
)


@given(settings)
def test_any_table_survives_toml(values: dict[str, object]):
    table = {"a": values, "b c": {"d": values}}
    assert tomllib.loads(format_table(table)) == table


@given(
    name=st.sampled_from(["a", "a.b", "run-1"]),
    steps=st.none() | st.integers(1, 10**9),
    lr=st.floats(1e-9, 1e3),
    lag=st.none() | st.integers(0, 9),
    skip=st.lists(st.text(max_size=9), max_size=3),
    methods=st.none()
    | st.dictionaries(
        st.text(max_size=5),
        st.sampled_from(["kfac", {"method": "rs-kfac", "rank": 3}, {"method": "x", "y": [[1, 2], True]}]),
        min_size=1,
        max_size=3,
    ),
)
def test_a_written_configuration_reads_back_equal(
    name: str, steps: int | None, lr: float, lag: int | None, skip: list[str], methods: dict[str, object] | None
):
    preconditioner = {
        "skip": skip,
        **({} if methods is None else {"methods": methods}),
        **({} if lag is None else {"adoption": "fixed-lag", "lag": lag}),
    }
    config = config_from_table(
        {
            "run": {"name": name, "steps": steps} if steps else {"name": name, "epochs": 2},
            "optimizer": {"lr": lr, "schedule": "step", "milestones": [3, 9]},
            "preconditioner": preconditioner,
        }
    )
    again = config_from_table(tomllib.loads(to_toml(config)))
    assert again == config
    assert list(again.preconditioner.methods or {}) == list(methods or {})


def test_a_resolved_file_is_a_configuration_file(tmp_path: Path):
    config = load_config(None, environment={}, overrides=["run.epochs=2", "preconditioner.method=kfac"])
    assert load_config(write(tmp_path / "config.toml", to_toml(config)), environment={}) == config


def test_reading_a_configuration_needs_no_torch():
    script = "import sys, kfdist.config; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


@pytest.mark.parametrize(
    ("here", "certificates", "token_file"),
    [
        ({}, "/there", "/there.token"),
        ({"CERTIFICATES": "/here"}, "/here", None),  # with its own token in it
        ({"TOKEN_FILE": "/here.token"}, "/there", "/here.token"),
        ({"CERTIFICATES": "/here", "TOKEN_FILE": "/here.token"}, "/here", "/here.token"),
    ],
)
def test_a_node_s_own_environment_says_where_its_secrets_are_beside_what_holds_for_all(
    here: dict[str, str], certificates: str, token_file: str | None
):
    environment = {f"KFDIST_SECURITY__{name}": value for name, value in here.items()}
    others = SecuritySection(certificates="/there", token_file="/there.token")
    found = security_from_environment(environment, otherwise=others)
    assert (found.certificates, found.token_file) == (certificates, token_file)


def test_a_token_without_any_certificates_is_refused():
    environment = {"KFDIST_SECURITY__TOKEN_FILE": "/here.token"}
    for others in (None, SecuritySection()):
        with pytest.raises(ConfigError, match="security.certificates is missing.*from KFDIST_SECURITY__TOKEN_FILE"):
            security_from_environment(environment, otherwise=others)

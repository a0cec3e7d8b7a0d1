"""From the configuration's method to what `kfdist.Preconditioner` takes: by one line, or by name pattern."""

from pathlib import Path

import pytest
from torch import nn

from kfdist.config import load_config, to_toml
from kfdist.config.sections import NORMALISED_METHODS
from kfdist.curvature.auto import Auto
from kfdist.curvature.inverters import INVERTERS, make_inverter
from kfdist.errors import ConfigError
from kfdist.runtime.plan.planner import Method
from kfdist.training.method import make_method


def method_of(*overrides: str, file: Path | None = None) -> Method:
    return make_method(load_config(file, environment={}, overrides=overrides).preconditioner)


@pytest.mark.parametrize("name", INVERTERS)
def test_every_method_is_one_line_of_the_configuration(name: str) -> None:
    """The settings of the default method go with it; the optimizer has to be kfdist's where directions have a size."""
    wanted = make_inverter(name)
    assert (name in NORMALISED_METHODS) == wanted.produces.normalised
    optimizer = "kfdist" if wanted.produces.normalised else "sgd"
    assert method_of(f"preconditioner.method={name}", f"optimizer.name={optimizer}") == wanted


def test_directions_that_have_a_size_are_refused_to_an_optimizer_that_gives_them_another() -> None:
    with pytest.raises(ConfigError, match="is 'adamw', and directions of 'ekfac-adam' have Adam's size"):
        method_of('preconditioner.methods={"*" = "ekfac-adam"}', "optimizer.name=adamw")


def test_auto_is_one_line_of_the_configuration() -> None:
    assert method_of("preconditioner.method=auto") == Auto()
    tuned = method_of(
        "preconditioner.method=auto",
        "preconditioner.settings.seconds_per_inversion=3",
        'preconditioner.settings.allow=["kfac"]',
    )
    assert tuned == Auto(seconds_per_inversion=3, allow=("kfac",))


def test_no_method_is_none() -> None:
    """With the service as without, a baseline has a controller but no need of owners."""
    for link in ("local", "service"):
        assert method_of("preconditioner.method=none", f"cluster.link={link}", "cluster.owners=0") == "none"


def test_settings_of_every_kind_reach_the_method() -> None:
    made = method_of("preconditioner.method=sre-kfac", "preconditioner.settings.rank_schedule=[[0, 9], [5, 7]]")
    assert made == make_inverter("sre-kfac", rank_schedule=((0, 9), (5, 7)))


def test_the_settings_of_an_inner_method_are_a_table(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        '[preconditioner.methods]\nhead = "kfac"\n'
        '"*" = { method = "two-level", inner = "rs-kfac", inner_settings = { rank = 5 } }\n'
    )
    wanted = make_inverter("two-level", inner="rs-kfac", inner_settings={"rank": 5})
    assert method_of(file=file) == {"head": make_inverter("kfac"), "*": wanted}
    lines = ["preconditioner.method=two-level", "preconditioner.settings.inner=rs-kfac"]
    lines.append("preconditioner.settings.inner_settings.rank=5")
    assert method_of(*lines) == wanted
    (tmp_path / "written.toml").write_text(to_toml(load_config(file, environment={})))
    assert load_config(tmp_path / "written.toml", environment={}) == load_config(file, environment={})


def test_a_table_of_methods_keeps_its_order(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        '[preconditioner.methods]\nhead = { method = "kfac", damping_rule = "relative" }\n'
        '"conv*" = "rs-kfac"\n"*" = "auto"\n'
    )
    made = method_of(file=file)
    assert isinstance(made, dict)
    assert list(made.items()) == [
        ("head", make_inverter("kfac", damping_rule="relative")),
        ("conv*", make_inverter("rs-kfac")),
        ("*", Auto()),
    ]


@pytest.mark.parametrize(
    ("override", "path", "words"),
    [
        ("preconditioner.method=rskfac", "preconditioner.method", "did you mean 'rs-kfac'"),
        ("preconditioner.method=autp", "preconditioner.method", "did you mean 'auto'"),
        ("preconditioner.settings.ranks=3", "preconditioner.settings", "did you mean 'rank'"),
        ("preconditioner.settings.name=3", "preconditioner.settings", "rs-kfac has no setting 'name'"),
        (
            "preconditioner.settings.rank={least = 3}",
            "preconditioner.settings.rank",
            "{'least': 3} is not allowed; must be a whole number",
        ),
        ("preconditioner.settings.rank=0", "preconditioner.settings.rank", "0 is not allowed"),
        ("preconditioner.methods.head=kfak", "preconditioner.methods.head.method", "did you mean 'kfac'"),
        ('preconditioner.methods={"a.*" = "kfak"}', 'preconditioner.methods."a.*".method', "did you mean 'kfac'"),
        (
            'preconditioner.methods.head={method = "kfac", rank = 3}',
            "preconditioner.methods.head",
            "kfac has no setting 'rank'",
        ),
        (
            'preconditioner.methods.head={method = "rs-kfac", rank = 0}',
            "preconditioner.methods.head.rank",
            "0 is not allowed",
        ),
    ],
)
def test_what_is_wrong_with_a_method_is_told_with_its_path(override: str, path: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        method_of(override)
    assert caught.value.path == path
    assert str(caught.value).startswith(f"{path}: ") and words in str(caught.value)


def test_the_preconditioner_takes_what_is_made() -> None:
    import kfdist

    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    made = method_of('preconditioner.methods={"0" = "rs-kfac", "*" = "auto"}')
    assert made is not None
    with kfdist.Preconditioner(model, made, kl_clip=None) as preconditioner:
        rows = {row.parameter: row for row in preconditioner.coverage().rows}
    assert (rows["0.weight"].method, rows["2.weight"].method) == ("rs-kfac", "kfac-eigen")
    assert "of a budget of 2 s" in rows["2.weight"].reason

"""From the configuration's method to what `kfdist.Preconditioner` takes: by one line, or by name pattern."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import kfdist
from kfdist.config import load_config, to_toml
from kfdist.config.preconditioner_section import BY_WIDTH
from kfdist.config.sections import NORMALISED_METHODS
from kfdist.curvature import by_width
from kfdist.curvature.auto import Auto
from kfdist.curvature.inverters import INVERTERS, make_inverter
from kfdist.errors import ConfigError
from kfdist.runtime.plan.planner import Method
from kfdist.training.method import make_method, plan_of


def method_of(*overrides: str, file: Path | None = None) -> Method:
    return make_method(load_config(file, environment={}, overrides=overrides).preconditioner)


@pytest.mark.parametrize("name", INVERTERS)
def test_every_method_is_one_line_of_the_configuration(name: str) -> None:
    """The settings of the default method go with it; the optimizer has to be kfdist's where directions have a size."""
    wanted = make_inverter(name)
    assert (name in NORMALISED_METHODS) == wanted.produces.normalised
    assert method_of(f"preconditioner.method={name}") == wanted
    if not wanted.produces.normalised:
        assert method_of(f"preconditioner.method={name}", "optimizer.name=sgd") == wanted


def test_directions_that_have_a_size_are_refused_to_an_optimizer_that_gives_them_another() -> None:
    with pytest.raises(ConfigError, match="is 'adamw', and directions of 'ekfac-adam' have Adam's size"):
        method_of('preconditioner.methods={"*" = "ekfac-adam"}', "optimizer.name=adamw")
    dense = ["preconditioner.method=by-width", "preconditioner.settings.dense=ekfac-adam"]
    with pytest.raises(ConfigError, match="is 'adamw', and directions of 'ekfac-adam' have Adam's size"):
        method_of(*dense, "optimizer.name=adamw")


def test_by_width_is_made_by_names() -> None:
    assert BY_WIDTH == by_width.BY_WIDTH
    assert method_of(f"preconditioner.method={BY_WIDTH}", "optimizer.name=sgd") == kfdist.ByWidth()
    made = method_of(
        f"preconditioner.method={BY_WIDTH}",
        "preconditioner.settings.dense=kfac",
        "preconditioner.settings.dense_settings.damping_rule=relative",
        "preconditioner.settings.wide_settings.rank=64",
        "preconditioner.settings.eigen=64",
    )
    dense, wide = make_inverter("kfac", damping_rule="relative"), make_inverter("rs-kfac", rank=64)
    assert made == kfdist.ByWidth(dense=dense, wide=wide, eigen=64)


def test_another_dense_method_has_none_of_the_defaults_settings() -> None:
    assert method_of("preconditioner.settings.dense=kfac") == kfdist.ByWidth(dense=make_inverter("kfac"))


@pytest.mark.parametrize("graft", ["adamw", "sgd", "none"])
@pytest.mark.parametrize("periods", [{}, {"inverse_period": 40}, {"factor_period": 5}])
def test_the_default_is_what_the_optimizer_takes_by_itself(graft: str, periods: dict[str, int]) -> None:
    given = [f"optimizer.settings.graft={graft}", *(f"preconditioner.{name}={n}" for name, n in periods.items())]
    _compare(given, graft=None if graft == "none" else graft, **periods)


DENSE = "preconditioner.settings.dense"
WIDE = "preconditioner.settings.wide"
BASES = kfdist.EkfacAdam(basis_period=20)


@pytest.mark.parametrize(
    ("given", "arguments"),
    [
        ((f"{DENSE}=kfac-eigen",), {"method": kfdist.ByWidth(dense=kfdist.KfacEigen())}),
        (("preconditioner.method=by-width", f"{DENSE}=kfac-eigen"), {"method": kfdist.ByWidth()}),
        ((f"{WIDE}=rs-kfac",), {"method": kfdist.ByWidth(dense=BASES, wide=make_inverter("rs-kfac"))}),
        ((f"{DENSE}=ekfac-adam",), {}),
        ((f"{WIDE}=ekfac-adam",), {}),
        ((f"{DENSE}=ekfac-adam", "preconditioner.inverse_period=40"), {"inverse_period": 40}),
    ],
)
def test_a_method_that_is_named_is_what_the_optimizer_takes(given: tuple[str, ...], arguments: dict[str, Any]) -> None:
    """However it is spelled; the default's own name is the default."""
    _compare(given, **arguments)


def _compare(given: Sequence[str], **arguments: Any) -> None:
    config = load_config(None, environment={}, overrides=given)
    settings = plan_of(config, small_model(), world_size=1, costs=None).settings
    with kfdist.Optimizer(small_model(), **arguments) as optimizer:
        theirs = optimizer.preconditioner
        names = ("factor_period", "inverse_period", "ema_decay", "damping", "kl_clip", "fisher", "sampling")
        assert {n: getattr(settings, n) for n in names} == {n: getattr(theirs.settings, n) for n in names}
        plan = plan_of(config, small_model(), world_size=1, costs=None)
        assert [group.inverter for group in plan.groups] == [group.inverter for group in theirs.groups]
        (group,) = optimizer.param_groups
        assert config.optimizer.weight_decay == group["weight_decay"]


def small_model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 1100), nn.Tanh(), nn.Linear(1100, 4), nn.LayerNorm(4), nn.Linear(4, 2))


def test_an_optimizer_of_torch_has_the_defaults_it_had() -> None:
    config = load_config(None, environment={}, overrides=["optimizer.name=sgd"])
    assert (config.optimizer.lr, config.optimizer.weight_decay) == (0.1, 5e-4)
    section = config.preconditioner
    assert (section.method, section.settings, section.ema_decay) == ("rs-kfac", {"rank": 128}, 0.95)
    assert (section.factor_period, section.inverse_period, section.kl_clip) == (2, 10, 1e-2)
    named = load_config(None, environment={}, overrides=["optimizer.name=sgd", "preconditioner.method=kfac"])
    assert (named.preconditioner.settings, named.preconditioner.inverse_period) == ({}, 10)


@pytest.mark.parametrize(
    ("given", "rate"),
    [
        ((), 0.01),
        (("run.steps=3", "preconditioner.method=kfac"), 0.01),
        (("data.name=synthetic",), 0.003),
        (("model.name=mlp",), 0.003),
        (("optimizer.settings.graft=sgd",), 0.1),
        (("data.name=synthetic", "optimizer.name=adamw"), 0.1),
        (("data.name=synthetic", "optimizer.lr=0.5"), 0.5),
    ],
)
def test_the_learning_rate_that_is_best_on_the_digits_is_the_digits_runs(given: tuple[str, ...], rate: float) -> None:
    assert load_config(None, environment={}, overrides=given).optimizer.lr == rate


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
    ("overrides", "path", "words"),
    [
        ("preconditioner.method=rskfac", "preconditioner.method", "did you mean 'rs-kfac'"),
        ("preconditioner.method=autp", "preconditioner.method", "did you mean 'auto'"),
        ("optimizer.name=sgd preconditioner.settings.ranks=3", "preconditioner.settings", "did you mean 'rank'"),
        (
            "optimizer.name=sgd preconditioner.settings.name=3",
            "preconditioner.settings",
            "has no setting 'name'",
        ),
        (
            "optimizer.name=sgd preconditioner.settings.rank={least=3}",
            "preconditioner.settings.rank",
            "{'least': 3} is not allowed; must be a whole number",
        ),
        ("optimizer.name=sgd preconditioner.settings.rank=0", "preconditioner.settings.rank", "0 is not allowed"),
        ("preconditioner.settings.eigem=3", "preconditioner.settings", "did you mean 'eigen'"),
        ("preconditioner.settings.eigen=0", "preconditioner.settings.eigen", "0 is not allowed"),
        ("preconditioner.settings.dense=ekfac-adan", "preconditioner.settings.dense", "did you mean 'ekfac-adam'"),
        ("preconditioner.settings.dense=3", "preconditioner.settings.dense", "is 3; a method's name is needed"),
        ("preconditioner.settings.wide=[1]", "preconditioner.settings.wide", "is [1]; a method's name is needed"),
        (
            "preconditioner.method=two-level preconditioner.settings.inner=3",
            "preconditioner.settings.inner",
            "is 3; a method's name is needed",
        ),
        ("preconditioner.settings.dense=soap", "preconditioner.settings.dense", "takes whole parameters"),
        ("preconditioner.settings.dense_settings=3", "preconditioner.settings.dense_settings", "3"),
        (
            "preconditioner.settings.dense_settings.basis_perod=3",
            "preconditioner.settings.dense_settings",
            "did you mean 'basis_period'",
        ),
        (
            "preconditioner.settings.dense_settings.basis_period=0",
            "preconditioner.settings.dense_settings.basis_period",
            "0 is not allowed",
        ),
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
def test_what_is_wrong_with_a_method_is_told_with_its_path(overrides: str, path: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        method_of(*re.split(r" (?=preconditioner\.)", overrides))
    assert caught.value.path == path
    assert str(caught.value).startswith(f"{path}: ") and words in str(caught.value)


def test_the_preconditioner_takes_what_is_made() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    made = method_of('preconditioner.methods={"0" = "rs-kfac", "*" = "auto"}')
    assert made is not None
    with kfdist.Preconditioner(model, made, kl_clip=None) as preconditioner:
        rows = {row.parameter: row for row in preconditioner.coverage().rows}
    assert (rows["0.weight"].method, rows["2.weight"].method) == ("rs-kfac", "kfac-eigen")
    assert "of a budget of 2 s" in rows["2.weight"].reason

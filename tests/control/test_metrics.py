"""What members measure reaches Prometheus: right kinds and sums, bounded, never back; promtool and Prometheus judge."""

import math
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kfdist.control import series
from kfdist.control.series import RunSeries, Sender
from kfdist.errors import ConfigError
from kfdist.telemetry.metrics import METRICS, Across, Kind, fault_in
from kfdist.types import MetricSample
from tests.support.controller import ControllerThread, Member, sample, values
from tests.support.prometheus import Prometheus, needs_prometheus
from tests.support.waits import eventually

RANKS = [Sender("worker", str(rank)) for rank in range(3)]
BYTES = "kfdist_bytes_total"
EXPIRY = "kfdist_certificate_expiry_timestamp_seconds"
FILES = {"client.pem": "rank", "owner.pem": "owner"}


def exported(run: RunSeries) -> dict[tuple[str, tuple[str, ...]], float]:
    return {(metric.name, labels): value for metric, labels, value in run.values()}


class TestDeclarations:
    def test_names_and_helps_keep_prometheus_rules(self):
        for name, metric in METRICS.items():
            assert name == metric.name
            assert name.startswith("kfdist_")
            assert (metric.kind is Kind.COUNTER) == name.endswith("_total")
            assert metric.help.endswith(".")
            assert "run" not in metric.labels

    def test_histograms_alone_have_buckets_and_they_rise(self):
        for metric in METRICS.values():
            assert bool(metric.buckets) == (metric.kind is Kind.HISTOGRAM)
            assert list(metric.buckets) == sorted(set(metric.buckets))
            assert all(map(math.isfinite, metric.buckets))

    def test_blocks_label_gauges_by_their_worst_value_only(self):
        # Only these can share the series "other" beyond the cap.
        for metric in METRICS.values():
            if "block" in metric.labels:
                assert metric.kind is Kind.GAUGE and metric.across in (Across.MAX, Across.MIN)

    def test_only_labelled_counters_begin_at_zero_and_only_gauges_age(self):
        for metric in METRICS.values():
            assert not metric.known or (metric.kind is Kind.COUNTER and len(metric.labels) == 1)
            assert not metric.ages or (metric.kind is Kind.GAUGE and metric.name.endswith("_seconds"))

    @pytest.mark.parametrize(
        ("name", "value", "labels", "fault"),
        [
            ("kfdist_loss", 1.0, {}, ""),
            ("kfdist_loss", math.nan, {}, ""),
            ("kfdist_nonsense", 1.0, {}, "unknown_metric"),
            ("kfdist_run_epoch", 1.0, {}, "unknown_metric"),
            ("kfdist_loss", 1.0, {"rank": "1"}, "wrong_labels"),
            (BYTES, 1.0, {}, "wrong_labels"),
            (BYTES, 1.0, {"purpose": ""}, "bad_label_value"),
            (BYTES, 1.0, {"purpose": "x" * 201}, "bad_label_value"),
            (BYTES, -1.0, {"purpose": "jobs"}, "bad_value"),
            (BYTES, math.inf, {"purpose": "jobs"}, "bad_value"),
            ("kfdist_step_seconds", math.nan, {"phase": "total"}, "bad_value"),
        ],
    )
    def test_faults_in_samples(self, name, value, labels, fault):
        assert fault_in(MetricSample(name=name, value=value, labels=labels)) == fault


class TestSeries:
    @given(st.lists(st.tuples(st.sampled_from(RANKS), st.integers(0, 3), st.floats(0, 1e6)), max_size=60))
    def test_a_counter_never_goes_back(self, reports):
        run, last = RunSeries(), 0.0
        for sender, life, value in reports:
            run.ingest(sender, str(life), [MetricSample(name=BYTES, value=value, labels={"purpose": "jobs"})])
            now = exported(run)[BYTES, ("jobs",)]
            assert now >= last
            last = now

    def test_a_counter_adds_up_senders_and_their_lives(self):
        run = RunSeries()

        def report(sender: Sender, life: str, value: float) -> float:
            run.ingest(sender, life, [MetricSample(name=BYTES, value=value, labels={"purpose": "jobs"})])
            return exported(run)[BYTES, ("jobs",)]

        assert report(RANKS[0], "1", 10) == 10
        assert report(RANKS[1], "1", 5) == 15
        assert report(RANKS[0], "1", 12) == 17
        assert report(RANKS[0], "2", 30) == 47  # a new start that has already counted more than the old one
        assert report(RANKS[1], "1", 2) == 49  # started anew without saying so
        run.count(BYTES, {"purpose": "jobs"}, 1)
        assert exported(run)[BYTES, ("jobs",)] == 50

    def test_what_all_ranks_share_is_counted_once(self):
        run = RunSeries()
        for rank in RANKS:
            run.ingest(
                rank,
                "1",
                [MetricSample(name="kfdist_steps_total", value=7), MetricSample(name="kfdist_loss", value=0.1)],
            )
        assert exported(run) == {("kfdist_steps_total", ()): 7, ("kfdist_loss", ()): 0.1}

    def test_gauges_merge_as_declared_and_end_with_their_sender(self):
        run = RunSeries()
        for rank, value in zip(RANKS, (3.0, 9.0, 4.0), strict=True):
            run.ingest(
                rank,
                "1",
                [
                    MetricSample(name="kfdist_queue_depth", value=value),
                    MetricSample(name="kfdist_staleness_steps", value=value, labels={"block": "fc"}),
                ],
            )
        assert exported(run) == {("kfdist_queue_depth", ()): 16, ("kfdist_staleness_steps", ("fc",)): 9}
        run.forget_gauges(RANKS[1])
        assert exported(run) == {("kfdist_queue_depth", ()): 7, ("kfdist_staleness_steps", ("fc",)): 4}
        run.forget_gauges(RANKS[0])
        run.forget_gauges(RANKS[2])
        assert exported(run) == {}

    def test_gauges_end_with_the_life_of_their_sender(self):
        run = RunSeries()
        for life, method in (("1", "kfac"), ("2", "kfac-eigen"), ("2", "other")):
            labels = {"block": "fc", "method": method}
            run.ingest(RANKS[0], life, [MetricSample(name="kfdist_block_method_info", value=1, labels=labels)])
        assert [labels for _, labels in exported(run)] == [("fc", "kfac-eigen"), ("fc", "other")]

    def test_seconds_of_staleness_rise_while_their_sender_hangs_and_steps_do_not(self):
        now = [100.0]
        run = RunSeries(lambda: now[0])
        told = {"kfdist_staleness_seconds": 2.5, "kfdist_staleness_steps": 7.0}
        run.ingest(
            RANKS[0], "1", [MetricSample(name=name, value=v, labels={"block": "fc"}) for name, v in told.items()]
        )
        now[0] += 40.0
        aged = {"kfdist_staleness_seconds": 42.5, "kfdist_staleness_steps": 7.0}
        assert {name: value for (name, _), value in exported(run).items()} == aged
        assert run.gauges_of(RANKS[0]) == aged

    @given(st.lists(st.floats(0, 200), min_size=1, max_size=50))
    def test_histograms_count_every_observation_where_it_belongs(self, seconds):
        run = RunSeries()
        labels = {"method": "kfac"}
        run.ingest(
            RANKS[1], "1", [MetricSample(name="kfdist_inversion_seconds", value=s, labels=labels) for s in seconds]
        )
        ((metric, _, histogram),) = run.histograms()
        assert histogram.total == pytest.approx(sum(seconds))
        for text, count in histogram.cumulative():
            assert count == sum(s <= float(text) for s in seconds)
        assert len(histogram.cumulative()) == len(metric.buckets) + 1

    def test_blocks_beyond_the_cap_share_a_series(self, monkeypatch):
        monkeypatch.setattr(series, "MAX_BLOCKS", 3)
        run = RunSeries()
        for offset in (0, 100):
            samples = [
                MetricSample(name="kfdist_staleness_steps", value=offset + i, labels={"block": f"layer{i}"})
                for i in reversed(range(6))
            ]
            assert run.ingest(RANKS[0], "1", samples) == {}
            found = {labels[0]: value for (_, labels), value in exported(run).items()}
            assert found == {
                "layer5": offset + 5,
                "layer4": offset + 4,
                "layer3": offset + 3,
                "other": offset + 2,
            }

    def test_other_tells_how_old_the_block_is_that_is_the_stalest_by_its_own_period(self, monkeypatch):
        """The alert compares them: a block due every 20 steps doesn't hide behind a healthy one due every 100."""
        monkeypatch.setattr(series, "MAX_BLOCKS", 1)
        run = RunSeries()
        names = ("kfdist_staleness_steps", "kfdist_update_period_steps", "kfdist_staleness_seconds")
        told = {"first": (1, 20, 0.5), "slow": (101, 100, 4.0), "stuck": (95, 20, 3.0), "new": (0, 20, 0.0)}
        samples = [
            MetricSample(name=name, value=values[place], labels={"block": block})
            for place, name in enumerate(names)
            for block, values in told.items()
        ]
        residuals = [
            MetricSample(name="kfdist_inversion_rung", value=place, labels={"block": block})
            for place, block in enumerate(told)
        ]
        assert run.ingest(RANKS[0], "1", [*samples, *residuals]) == {}
        found = exported(run)
        assert [round(found[name, ("other",)]) for name in names] == [95, 20, 3]
        assert [round(found[name, ("first",)], 1) for name in names[:2]] == [1, 20]
        assert found["kfdist_inversion_rung", ("other",)] == 3

    def test_other_stands_for_the_same_blocks_in_every_metric(self, monkeypatch):
        """Else staleness would be compared with another block's period."""
        monkeypatch.setattr(series, "MAX_BLOCKS", 2)
        run, names = RunSeries(), ("kfdist_staleness_steps", "kfdist_update_period_steps")
        for name, order in zip(names, ((0, 1, 2, 3), (3, 2, 1, 0)), strict=True):
            run.ingest(RANKS[0], "1", [MetricSample(name=name, value=i, labels={"block": f"b{i}"}) for i in order])
        found = [{labels for (each, labels) in exported(run) if each == name} for name in names]
        assert found[0] == found[1] == {("b0",), ("b1",), ("other",)}

    @pytest.mark.parametrize(
        ("name", "worst"), [("kfdist_inversion_rung", 3.0), ("kfdist_inversion_smallest_eigenvalue", -2.0)]
    )
    def test_the_worst_block_speaks_for_those_that_share_a_series_and_for_the_metric(self, monkeypatch, name, worst):
        monkeypatch.setattr(series, "MAX_BLOCKS", 1)
        run, factor = RunSeries(), {"factor": "A"} if "factor" in METRICS[name].labels else {}
        values = [1.0, -2.0, 3.0]
        run.ingest(
            RANKS[0],
            "1",
            [MetricSample(name=name, value=v, labels={"block": f"layer{i}", **factor}) for i, v in enumerate(values)],
        )
        found = {labels[0]: value for (_, labels), value in exported(run).items()}
        assert found == {"layer0": 1.0, "other": worst}
        assert run.gauges_of(RANKS[0]) == {name: worst}

    def test_other_labels_are_bounded_too(self):
        run = RunSeries()
        samples = [MetricSample(name="kfdist_failures_total", value=1, labels={"reason": str(i)}) for i in range(70)]
        assert run.ingest(RANKS[0], "1", samples) == {"too_many_label_values": 6}
        assert len(exported(run)) == series.MAX_LABEL_VALUES


def feed(member: Member) -> None:
    """Sends one of everything, as a run of two ranks and one owner would."""
    member.register_owner("owner-0")
    member.register_owner("owner-0", restarts=2, pid=8)
    for rank in (0, 1):
        member.register_worker("digits", rank=rank, world_size=2)
    for rank in (0, 1):
        samples = [
            sample(
                metric.name,
                0.25 if metric.kind is Kind.HISTOGRAM else 3,
                **{label: 'a "quoted" layer\\1' if label == "block" else f"some-{label}" for label in metric.labels},
            )
            for metric in METRICS.values()
            if metric.sent
        ]
        member.beat_worker("digits", rank=rank, step=11, samples=(*samples, sample("kfdist_unknown", 1)))
    lost = [sample("kfdist_restarts_total", 4, process="inverter", run=run) for run in ("digits", "nowhere")]
    member.beat_owner("owner-0", tuple(lost))


def test_a_scrape_shows_everything_declared(controller, member):
    feed(member)
    eventually(lambda: values(controller.scrape()).get('kfdist_run_step{run="digits"}'), lambda step: step == 11)
    text = controller.scrape()
    for metric in METRICS.values():
        assert f"# TYPE {metric.name} {metric.kind}" in text
        assert f"# HELP {metric.name} {metric.help}" in text
    found = values(text)
    assert found['kfdist_bytes_total{purpose="some-purpose",run="digits"}'] == 6
    assert found['kfdist_steps_total{run="digits"}'] == 3
    assert found['kfdist_step_seconds_count{phase="some-phase",run="digits"}'] == 2
    assert found['kfdist_step_seconds_bucket{le="0.3",phase="some-phase",run="digits"}'] == 2
    assert found['kfdist_step_seconds_bucket{le="0.2",phase="some-phase",run="digits"}'] == 0
    assert found['kfdist_step_seconds_sum{phase="some-phase",run="digits"}'] == 0.5
    assert found['kfdist_staleness_steps{block="a \\"quoted\\" layer\\\\1",run="digits"}'] == 3
    assert found['kfdist_restarts_total{process="inverter",run="digits"}'] == 4
    assert found['kfdist_run_state{run="digits",state="running"}'] == 1
    assert found['kfdist_run_state{run="digits",state="lost"}'] == 0
    assert found['kfdist_live_workers{run="digits"}'] == 2
    assert found['kfdist_live_owners{run="digits"}'] == 1
    assert found['kfdist_up{run="digits"}'] == 1
    assert abs(found['kfdist_last_beat_timestamp_seconds{run="digits"}'] - time.time()) < 30
    assert found['kfdist_samples_dropped_total{reason="unknown_metric"}'] == 2
    assert found['kfdist_samples_dropped_total{reason="unknown_run"}'] == 1
    assert any(series.startswith("kfdist_build_info{") and value == 1 for series, value in found.items())


def test_what_was_measured_can_be_listed(client, member):
    client.create("digits")
    assert client.samples("digits") == []
    feed(member)
    listed = {(each.name, *each.labels.values()): each.value for each in client.samples("digits")}
    assert listed["kfdist_bytes_total", "some-purpose"] == 6
    assert listed["kfdist_staleness_steps", 'a "quoted" layer\\1'] == 3
    assert listed["kfdist_step_seconds_sum", "some-phase"] == 0.5
    assert listed["kfdist_step_seconds_count", "some-phase"] == 2
    with pytest.raises(ConfigError, match="no run 'digist' here; did you mean 'digits'"):
        client.samples("digist")


def test_what_has_not_gone_wrong_yet_is_zero(controller, member):
    member.register_worker("digits")
    member.beat_worker("digits", samples=(sample("kfdist_failures_total", 2, reason="crash"),))
    found = values(controller.scrape())
    assert found['kfdist_failures_total{reason="crash",run="digits"}'] == 2
    assert found['kfdist_nonfinite_drops_total{run="digits"}'] == 0
    for metric in METRICS.values():
        for value in set(metric.known) - {"crash"}:
            assert found[f'{metric.name}{{{metric.labels[0]}="{value}",run="digits"}}'] == 0


def test_restarts_of_owners_are_counted_for_runs_that_last(controller, member):
    member.register_worker("digits")
    member.register_owner("owner-0")
    member.register_owner("owner-0", restarts=3, pid=8)
    assert values(controller.scrape())['kfdist_restarts_total{process="owner",run="digits"}'] == 3


def test_owners_that_were_drained_before_they_went_are_retired(controller, client, member):
    def counts() -> tuple[float, float]:
        found = values(controller.scrape())
        return found['kfdist_live_owners{run="digits"}'], found["kfdist_retired_owners"]

    member.register_worker("digits")
    member.register_owner("owner-0")
    member.register_owner("owner-1")
    client.drain("owner-1")
    assert counts() == (2, 0)
    assert eventually(counts, lambda seen: seen == (0, 1))
    member.register_owner("owner-1", restarts=1)
    assert eventually(counts, lambda seen: seen == (1, 0))


def test_the_first_certificate_to_expire_is_told_and_an_owners_only_while_it_lives(controller, client, member):
    def told() -> dict[str, float]:
        found = values(controller.scrape())
        return {name: value for name, value in found.items() if name.startswith(EXPIRY)}

    member.register_owner("owner-0")
    for rank in (0, 1):
        member.register_worker("digits", rank=rank, world_size=2)
    for rank, when in ((0, 300), (1, 200)):
        member.beat_worker("digits", rank=rank, samples=(sample(EXPIRY, when, process="rank", file="client.pem"),))
    member.beat_owner("owner-0", (sample(EXPIRY, 100, process="owner", file="owner.pem"), sample("kfdist_loss", 1)))
    rank, owner = (f'{EXPIRY}{{file="{file}",process="{process}"}}' for file, process in FILES.items())
    assert told() == {rank: 200, owner: 100}
    assert values(controller.scrape())['kfdist_samples_dropped_total{reason="wrong_labels"}'] == 1

    def kept_alive() -> dict[str, float]:
        for each in (0, 1):
            member.beat_worker("digits", rank=each)
        return told()

    assert eventually(kept_alive, lambda seen: owner not in seen) == {rank: 200}
    eventually(told, lambda seen: not seen)


def test_gauges_of_a_run_that_has_ended_are_shown_for_a_last_scrape_only(controller, client, member, monkeypatch):
    member.register_worker("digits")
    member.beat_worker("digits", samples=(sample("kfdist_loss", 1.5), sample("kfdist_steps_total", 9)))
    expiry = sample(EXPIRY, 300, process="rank", file="client.pem")
    member.beat_worker("digits", samples=(expiry,))
    assert EXPIRY in controller.scrape()
    member.beat_worker("digits", phase="finished", samples=(expiry,))
    assert EXPIRY not in controller.scrape()
    assert values(controller.scrape())['kfdist_loss{run="digits"}'] == 1.5
    monkeypatch.setattr("kfdist.control.exporter.LAST_GAUGES_SECONDS", 0.0)
    found = values(controller.scrape())
    assert 'kfdist_loss{run="digits"}' not in found
    assert found['kfdist_steps_total{run="digits"}'] == 9
    assert found['kfdist_run_state{run="digits",state="finished"}'] == 1
    assert "kfdist_loss" in [each.name for each in client.samples("digits")]


def test_a_lost_run_shows_no_gauges_of_the_past(controller, client, member):
    member.register_worker("digits")
    member.beat_worker("digits", samples=(sample("kfdist_loss", 1.5), sample("kfdist_steps_total", 9)))
    assert values(controller.scrape())['kfdist_loss{run="digits"}'] == 1.5
    eventually(lambda: values(controller.scrape()).get('kfdist_up{run="digits"}'), lambda up: up == 0)
    found = values(controller.scrape())
    assert 'kfdist_loss{run="digits"}' not in found
    assert found['kfdist_steps_total{run="digits"}'] == 9
    assert found['kfdist_run_state{run="digits",state="lost"}'] == 1


def test_too_many_samples_are_cut_and_counted(controller, member, monkeypatch):
    monkeypatch.setattr("kfdist.control.validation.MAX_SAMPLES", 5)
    member.register_worker("digits")
    member.beat_worker("digits", samples=tuple(sample("kfdist_step_seconds", 1, phase="total") for _ in range(8)))
    found = values(controller.scrape())
    assert found['kfdist_step_seconds_count{phase="total",run="digits"}'] == 5
    assert found['kfdist_samples_dropped_total{reason="too_many_samples"}'] == 3


def test_old_runs_give_way(controller, member, monkeypatch):
    monkeypatch.setattr("kfdist.control.exporter.MAX_RUNS", 2)
    for run in ("one", "two", "three"):
        member.register_worker(run)
        member.beat_worker(run)
    found = values(controller.scrape())
    assert [run for run in ("one", "two", "three") if f'kfdist_up{{run="{run}"}}' in found] == ["two", "three"]


PROMTOOL = shutil.which("promtool")


@pytest.mark.skipif(PROMTOOL is None, reason="promtool isn't installed (Debian: apt-get install prometheus)")
def test_promtool_finds_nothing_to_say(controller, member):
    feed(member)
    assert PROMTOOL is not None
    checked = subprocess.run(
        [PROMTOOL, "check", "metrics"], input=controller.scrape(), capture_output=True, text=True, timeout=30
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


@needs_prometheus
def test_prometheus_scrapes_it(tmp_path: Path):
    with ControllerThread(tmp_path / "c.sqlite") as controller, Member(controller.address) as member:
        feed(member)
        with Prometheus(tmp_path, controller.controller.metrics_address) as prometheus:
            result = eventually(lambda: prometheus.query("sum by (run) (kfdist_bytes_total)"), bool, seconds=20)
            assert [(series["metric"], series["value"][1]) for series in result] == [({"run": "digits"}, "6")]
            assert [series["value"][1] for series in prometheus.query('up{job="kfdist"}')] == ["1"]

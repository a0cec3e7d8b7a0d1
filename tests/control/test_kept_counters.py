"""Counters go on over the controller's restarts: Prometheus sees what was counted meanwhile, and no more."""

import logging
from pathlib import Path

import pytest

from kfdist.control.exporter import Exporter
from kfdist.control.series import RunSeries, Sender
from kfdist.errors import EnvironmentFault
from kfdist.telemetry.metrics import METRICS, Kind
from kfdist.types import MetricSample
from tests.support.controller import ControllerThread, Member, address_of_its_own, sample, values
from tests.support.killed_controllers import KilledController
from tests.support.prometheus import Prometheus, needs_prometheus
from tests.support.waits import eventually

COUNTERS = [metric.name for metric in METRICS.values() if metric.kind is Kind.COUNTER and metric.by_run]
CRASHES = 'kfdist_failures_total{reason="crash",run="digits"}'
DROPS = 'kfdist_nonfinite_drops_total{run="digits"}'


def drops(count: float) -> MetricSample:
    return MetricSample(name="kfdist_nonfinite_drops_total", value=count)


def report(member: Member, rank: int, *, epoch: int = 1, crashes: float, dropped: float) -> None:
    member.register_worker("digits", rank=rank, world_size=2, epoch=epoch)
    counted = (
        sample("kfdist_failures_total", crashes, reason="crash"),
        sample("kfdist_nonfinite_drops_total", dropped),
        sample("kfdist_steps_total", 100 * epoch),
    )
    member.beat_worker("digits", rank=rank, epoch=epoch, samples=counted)


@needs_prometheus
def test_killed_and_started_again_it_shows_what_was_counted_meanwhile_and_no_more(tmp_path: Path):
    controller = KilledController(tmp_path, address_of_its_own(), address_of_its_own())
    controller.start()
    with Prometheus(tmp_path, controller.metrics_address) as prometheus, Member(controller.address) as member:

        def total(series: str) -> float | None:
            found = prometheus.query(series)
            return float(found[0]["value"][1]) if found else None

        def scrapes() -> float:
            return float(prometheus.query("sum(count_over_time(kfdist_build_info[1h]))")[0]["value"][1])

        for epoch in (1, 2):  # what the first start counted is told by nobody any more
            for rank in (0, 1):
                report(member, rank, epoch=epoch, crashes=5, dropped=7)
        member.register_owner("owner-0")
        member.register_owner("owner-0", restarts=3, pid=8)
        eventually(lambda: (total(CRASHES), total(DROPS)), lambda seen: seen == (20, 28), seconds=30)
        member.hang_up()
        controller.kill()
        controller.start()
        seen = scrapes()
        eventually(scrapes, lambda now: now >= seen + 2, seconds=30)  # while nobody has told it anything
        report(member, 1, epoch=2, crashes=5, dropped=8)
        seen = scrapes()
        eventually(scrapes, lambda now: now >= seen + 2, seconds=30)  # while one rank has
        report(member, 0, epoch=2, crashes=7, dropped=7)
        eventually(lambda: (total(CRASHES), total(DROPS)), lambda seen: seen == (22, 29), seconds=30)
        for name in COUNTERS:
            assert all(each["value"][1] == "0" for each in prometheus.query(f"resets({name}[1h])")), name
        assert total('kfdist_steps_total{run="digits"}') == 300
        assert total('kfdist_restarts_total{process="owner",run="digits"}') == 3
    controller.kill()


def test_ranks_that_an_earlier_controller_knew_are_heard_before_anything_is_said_to_be_zero(tmp_path: Path):
    """It was never scraped, so nothing was kept."""
    with ControllerThread(tmp_path / "c.sqlite") as controller, Member(controller.address) as member:
        report(member, 0, crashes=5, dropped=7)
    with ControllerThread(tmp_path / "c.sqlite") as controller, Member(controller.address) as member:
        assert CRASHES not in values(controller.scrape())
        report(member, 0, crashes=5, dropped=7)
        assert values(controller.scrape())[CRASHES] == 5


def test_counters_of_a_metric_or_label_that_this_version_lacks_are_left_out():
    run = RunSeries()
    totals = [("worker", "0", "1", 1.0, 2.0)]
    run.go_on(
        [
            ("kfdist_nonfinite_drops_total", (), totals),
            ("kfdist_forgotten_total", (), totals),
            ("kfdist_failures_total", ("crash", "owner-0"), totals),
        ]
    )
    assert [(metric.name, value) for metric, _, value in run.values()] == [("kfdist_nonfinite_drops_total", 3.0)]


def test_what_could_not_be_kept_is_shown_and_kept_with_the_next_scrape(caplog: pytest.LogCaptureFixture):
    kept, faults = [], [EnvironmentFault("the disk is full")]

    def keep(counters):
        if faults:
            raise faults.pop()
        kept.append(counters)

    exporter, rank = Exporter(), Sender("worker", "0")
    exporter.go_on({"digits": [("kfdist_nonfinite_drops_total", (), [("worker", "0", "1", 0.0, 2.0)])]}, keep)

    def shown() -> float:
        return next(each.samples for each in exporter.collect() if each.name == "kfdist_nonfinite_drops")[0].value

    assert shown() == 2
    assert kept == []  # nothing was counted since
    exporter.ingest("digits", rank, "1", [drops(3.0)])
    with caplog.at_level(logging.ERROR):
        assert shown() == 3
    assert "the disk is full" in caplog.text
    assert shown() == 3
    assert shown() == 3
    assert kept == [{"digits": [("kfdist_nonfinite_drops_total", (), [("worker", "0", "1", 0.0, 3.0)])]}]

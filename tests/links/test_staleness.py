"""The staleness of the inverses, as Prometheus scrapes it, while nobody inverts and then while nobody steps."""

import signal
import time
from collections.abc import Callable

import kfdist
from tests.support.controller import ControllerThread, values
from tests.support.owners import OwnerProcess
from tests.support.preconditioning import backward, preconditioner, two_layers
from tests.support.waits import eventually

BLOCKS = ("0", "2")


def between(look: Callable[[], float]) -> tuple[float, float, float]:
    """Returns what it sees, and the times before and after it looked."""
    before = time.monotonic()
    return look(), before, time.monotonic()


def test_a_stopped_owner_is_seen_in_steps_and_seconds_also_after_the_last_step(tmp_path):
    model = two_layers()
    used, measured, adoptions = dict.fromkeys(BLOCKS, -1), {}, {}
    with (
        ControllerThread(tmp_path / "control.sqlite", lease_seconds=2.0) as controller,
        OwnerProcess("owner-0", folder=tmp_path, controller=controller.address) as owner,
        preconditioner(
            model,
            inverse_period=2,
            adoption="asap",
            link=kfdist.connect(controller.address, run="stale", epoch=1),
        ) as pre,
    ):

        def step() -> None:
            backward(model)
            before = time.monotonic()
            report = pre.step()
            measured[report.step] = before, time.monotonic()
            for block, version in report.adopted:
                used[block], adoptions[block] = version, report.step
            model.zero_grad()
            pre.beat("running")

        def scraped(name: str, block: str) -> float:
            return values(controller.scrape())[f'kfdist_{name}{{block="{block}",run="stale"}}']

        def heard(last: int) -> None:
            path = 'kfdist_staleness_steps{block="0",run="stale"}'
            eventually(lambda: values(controller.scrape()).get(path), lambda seen: seen == last - used["0"], seconds=60)

        # Until the service has brought something beside the first version.
        eventually(step, lambda _: min(used.values()) > 0, seconds=60)
        owner.signal(signal.SIGSTOP)
        for _ in range(40):
            step()
        last = max(measured)
        heard(last)
        for block in BLOCKS:
            assert scraped("staleness_steps", block) == last - used[block] >= 40
            assert scraped("delay_steps", block) == adoptions[block] - used[block] > 0
            taken = measured[used[block]]
            seconds, before, after = between(lambda block=block: scraped("staleness_seconds", block))
            assert measured[last][1] - taken[1] <= seconds <= after - taken[0]
        # All ranks have stopped stepping; nobody says anything new. Seconds rise by those that pass, steps don't.
        first, *earlier = between(lambda: scraped("staleness_seconds", "2"))
        owners = 'kfdist_live_owners{run="stale"}'
        eventually(lambda: values(controller.scrape())[owners], lambda live: live == 0, seconds=60)
        time.sleep(1.0)
        second, *later = between(lambda: scraped("staleness_seconds", "2"))
        assert later[0] - earlier[1] <= second - first <= later[1] - earlier[0]
        assert second - first > 1.0
        assert scraped("staleness_steps", "2") == last - used["2"]

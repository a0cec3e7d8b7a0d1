"""The launcher of `kfdist train`: starts controller, pool and ranks on this machine, and ends every one of them.

The ranks decide how a launch ends. The controller and the pool are started again when they die, since nothing in them
is needed to go on; a rank that dies ends the launch, because its share of the step dies with it. What the launcher
starts carries a mark and descends from it (`kfdist.system.processes`); when it leaves, nothing of that is left. If it
is killed itself, its children see that and end (`kfdist.system.lifetime`).
"""

import os
import signal
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kfdist.comm.rendezvous import host_rendezvous
from kfdist.config import Config, to_toml
from kfdist.curvature.auto import MeasuredCosts
from kfdist.errors import EnvironmentFault, ExitCode, KfdistError
from kfdist.launch.outcome import (
    add_to_summary,
    child_fault,
    ending_of,
    is_held,
    last_words,
    longest_checkpoint,
    remove_untrained,
    report_line,
)
from kfdist.launch.scratch import check_scratch, temporary_directory
from kfdist.launch.supervision import SupervisedProcess
from kfdist.launch.terminal import StopRequests, Terminal, summary_line
from kfdist.rpc.certificate_faults import check_credentials
from kfdist.system.addresses import check_bindable, metrics_url, split_address
from kfdist.system.credentials import Role
from kfdist.system.files import check_working_directory, make_directory
from kfdist.system.lifetime import LAUNCH_VARIABLE, PARENT_VARIABLE
from kfdist.system.processes import (
    Child,
    Command,
    become_subreaper,
    children_of,
    describe_exit,
    reap_orphans,
    sweep,
)
from kfdist.system.run_summary import read_summary, unsaved
from kfdist.system.slowness import told_while_long
from kfdist.system.spawn import inherited_environment, module_command
from kfdist.training.run_directory import inspect_run, read_costs
from kfdist.training.setup import check_devices, gather_materials

CONTROLLER_READY_SECONDS = 30.0
POOL_READY_SECONDS = 120.0
SLOW_SECONDS = 30.0
"""How long checks may take without a word, and then between two."""
STOP_RANKS_SECONDS = 6.5
"""How long ranks may take to stop after the first Ctrl-C, beside what their checkpoints took so far, three times over;
with the services, all of a small run ends within 10 s."""
STOP_SERVICES_SECONDS = 2.0
END_SERVICES_SECONDS = 8.0
"""How long the services may take to end after the run ended by itself; no user is waiting then."""
FAILURE_SECONDS = 3.0
"""How long the other ranks may take to end by themselves after one died; they have lost a peer and raise as a rule."""

_IMPATIENT = 2
"""After so many requests to stop, nothing is waited for any more."""
_KILL_SECONDS = 1.0
_TICK_SECONDS = 0.05
_EXPECTED = (None, ExitCode.DONE, ExitCode.RESUMABLE)
RESUME_ADVICE = "run the same command again to resume"


def train(config: Config, terminal: Terminal, requests: StopRequests) -> int:
    """Trains on this machine: checks everything that can be checked, then launches.

    Args:
        config: The configuration.
        terminal: Where to report progress.
        requests: Counts the signals that ask to stop.

    Returns:
        The exit code: 0 done, 75 stopped and resumable, 130 ended at once.

    Raises:
        ConfigError: A value is wrong; nothing was started.
        EnvironmentFault: Something the run needs could not be had, or a process failed.
    """
    try:
        # Listing a large data set takes minutes, and where its file system doesn't answer there is no end to it.
        with requests.raising(), told_while_long(partial(say_slow, terminal, config), every_seconds=SLOW_SECONDS):
            if not (finished := check_launch(config)):
                check_devices(config)
    except KeyboardInterrupt:
        return stopped_in_checks(config, terminal)
    if not finished:
        return Launch(config, terminal, requests).run()
    terminal.say(finished)
    terminal.result(read_summary(config.run.directory))
    return ExitCode.DONE


def say_slow(terminal: Terminal, config: Config, seconds: float) -> None:
    """Says that a launch is still in its checks after so many seconds, and at what."""
    terminal.say(
        f"still checking, for {seconds:.0f} s: the data ({config.data.name}) is listed, the model built, and both are "
        "tried; nothing is started yet"
    )


def stopped_in_checks(config: Config, terminal: Terminal) -> int:
    """Says that a launch was asked to stop before it had started anything; returns its exit code."""
    terminal.say("stopped before anything was started; the same command starts it")
    terminal.result(read_summary(config.run.directory))
    return ExitCode.RESUMABLE


def check_launch(config: Config, *, own_controller: bool = True) -> str:
    """Checks everything that can be checked before a process is started.

    Args:
        config: The configuration.
        own_controller: Whether the launch starts a controller, rather than finding one.

    Returns:
        Why there is nothing left to do; empty if there is.

    Raises:
        ConfigError: A value is wrong.
        EnvironmentFault: Something the run needs can't be had.
    """
    finished = inspect_run(config)
    if config.cluster.link == "service":
        check_working_directory()
        if own_controller:
            check_bindable(*split_address(config.control.address), path="control.address")
            check_bindable(*split_address(config.control.metrics_address), path="control.metrics_address")
        for role in Role if own_controller else (Role.OWNER, Role.CLIENT):
            if (credentials := config.security.credentials(role)) is not None:
                check_credentials(credentials)
    # Last, as a job puts up with a lack of data on its node.
    # The device a rank will use is its own to find; everything else is the same on the CPU.
    # What inversions cost is for the ranks to measure: until then nothing is too expensive.
    costs = read_costs(config.run.directory) or MeasuredCosts(rates={})
    gather_materials(config, config.cluster.workers, torch.device("cpu"), costs)
    return finished


class StopAsked(Exception):
    """The first request to stop."""


class KillAsked(Exception):
    """The second request to stop: no more waiting."""


class Launch:
    """One launch of a run on this machine, from the first process to the last.

    Attributes:
        stop_ranks_seconds: How long ranks may take to stop after the first request, as `STOP_RANKS_SECONDS`.
    """

    stop_ranks_seconds = STOP_RANKS_SECONDS

    def __init__(self, config: Config, terminal: Terminal, requests: StopRequests) -> None:
        """Prepares a launch; starts nothing yet. Arguments as for `train`."""
        self._config = config
        self._terminal = terminal
        self._requests = requests
        self._stopping = False
        self._mark = uuid.uuid4().hex
        self._spared = children_of(os.getpid())
        self._found = read_summary(config.run.directory)
        self._ended = ""  # how, if not as asked; for the summary
        self._services: dict[str, SupervisedProcess] = {}
        self._ranks: list[Child] = []

    def run(self) -> int:
        """Runs the launch to its end and returns the exit code.

        Raises:
            ConfigError: A process refused the configuration.
            EnvironmentFault: A process failed, or could not be started.
        """
        become_subreaper()
        untrained = make_directory(self._config.run.directory / "logs")
        with temporary_directory() as self._scratch:
            try:
                code = self._run_and_clean_up(untrained)
            except KfdistError as error:
                with suppress(OSError, ValueError):  # the first error is the one to tell
                    self._complete_summary(failed=str(error))
                self._report()
                raise
            return self._conclude(code)

    def _run_and_clean_up(self, untrained: Sequence[Path]) -> int:
        try:
            return self._run_until_end()
        finally:
            self._end()
            if not self._trains_elsewhere():
                remove_untrained(untrained, unless_trained=self._config.run.directory)

    def _run_until_end(self) -> int:
        try:
            try:
                self._start()
                return self._watch_ranks()
            except StopAsked:
                return self._stop_ranks()
        except KillAsked:
            self._ended = "a second request to stop ended it at once"
            return ExitCode.INTERRUPTED

    # Starting

    def _start(self) -> None:
        self._terminal.say(f"run {self._config.run.name}: files in {self._config.run.directory}")
        if self._config.cluster.link == "service":
            self._start_controller()
            if self._config.preconditioner.inverts:
                self._start_pool()
        for command in self._rank_commands():
            self._ranks.append(Child(command))

    def _trains_elsewhere(self) -> bool:
        """Says whether ranks may have trained on other machines, where their traces are."""
        return False

    def _rank_commands(self) -> Iterator[Command]:
        """Yields how to start what trains."""
        rendezvous = self._rendezvous = host_rendezvous(self._config.cluster.workers)
        for rank in range(rendezvous.world_size):
            variables = {
                "OMP_NUM_THREADS": str(self._config.cluster.threads),
                # All ranks are on this machine, and neither gloo nor NCCL authenticates its peers.
                **{name: os.environ.get(name, "lo") for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")},
                **rendezvous.variables(rank),
            }
            yield self._command(f"rank {rank}", "worker", variables=variables, tells_user=rank == 0)

    def _start_controller(self) -> None:
        ready_file = self._scratch / "controller.json"
        controller = self._services["controller"] = SupervisedProcess(
            lambda restarts: self._command("controller", "serve", f"--ready-file={ready_file}"), ready_file
        )
        ready = self._wait_until_ready(controller, CONTROLLER_READY_SECONDS)
        addresses = {"address": ready["address"], "metrics_address": ready["metrics_address"]}
        # Ranks and owners keep the addresses, so a controller that is started again must have the same.
        control = self._config.control.model_copy(update=addresses)
        self._config = self._config.model_copy(update={"control": control})
        self._terminal.say(f"controller on {ready['address']}, metrics on {metrics_url(ready['metrics_address'])}")

    def _start_pool(self) -> None:
        def command(restarts: int) -> Command:
            # Removed with the rest, should the pool be killed before it has tidied up; a new one for each start.
            directory = self._scratch / f"ray-{restarts}"
            return self._command("pool", "pool", f"--ready-file={ready_file}", f"--directory={directory}")

        ready_file = self._scratch / "pool.json"
        self._services["pool"] = SupervisedProcess(command, ready_file)

    def _command(
        self,
        name: str,
        subcommand: str,
        *arguments: str,
        variables: Mapping[str, str] | None = None,
        tells_user: bool = False,
    ) -> Command:
        check_scratch(self._scratch)
        config_file = self._scratch / f"{name.replace(' ', '-')}.toml"
        config_file.write_text(to_toml(self._config), encoding="utf-8")
        marks = {LAUNCH_VARIABLE: self._mark, PARENT_VARIABLE: str(os.getpid()), "PYTHONUNBUFFERED": "1"}
        return Command(
            name=name,
            line=module_command("kfdist", subcommand, str(config_file), *arguments),
            environment={**inherited_environment(os.environ), **marks, **(variables or {})},
            log=self._config.run.directory / "logs" / f"{name.replace(' ', '-')}.log",
            terminal=self._terminal.descriptor if tells_user else None,
        )

    def _wait_until_ready(self, service: SupervisedProcess, seconds: float) -> Mapping[str, Any]:
        deadline = time.monotonic() + seconds
        while (ready := service.ready()) is None:
            self._check_start(service, deadline, seconds)
            self._tick()
        return ready

    def _check_start(self, service: SupervisedProcess, deadline: float, seconds: float) -> None:
        """Raises if a service that has never been ready has died or takes too long."""
        child = service.child
        if child is not None and (code := child.poll()) is not None:
            raise child_fault(child, code, "before it was ready")
        if child is not None and time.monotonic() > deadline:
            raise EnvironmentFault(
                f"the {service.name} wasn't ready within {seconds:g} s; the end of its log:\n{child.log_tail()}"
            )

    # Watching

    def _watch_ranks(self) -> int:
        pool = self._services.get("pool")
        deadline = time.monotonic() + POOL_READY_SECONDS
        waiting = pool is not None
        while True:
            codes = [rank.poll() for rank in self._ranks]
            failed = [rank for rank, code in zip(self._ranks, codes, strict=True) if code not in _EXPECTED]
            if failed:
                raise self._rank_failure(failed)
            if None not in codes:
                return ExitCode.RESUMABLE if ExitCode.RESUMABLE in codes else ExitCode.DONE
            if pool is not None and waiting:
                if (ready := pool.ready()) is not None:
                    waiting = False
                    self._terminal.say(f"pool with {ready['owners']} owners")
                else:
                    self._check_start(pool, deadline, POOL_READY_SECONDS)
            self._supervise(but="pool" if waiting else None)
            self._tick()

    def _supervise(self, but: str | None) -> None:
        for name, service in self._services.items():
            if name == but:
                continue
            if (event := service.supervise()) is not None:
                self._terminal.warn(event)
                if service.gave_up and name == "controller":
                    self._terminal.warn("training goes on without a controller: no metrics, no commands")
                elif service.gave_up:
                    self._stop_ranks()
                    raise EnvironmentFault(f"no owners can be had any more; {RESUME_ADVICE} from the newest checkpoint")

    def _rank_failure(self, failed: list[Child]) -> KfdistError:
        """Ends the other ranks and returns the first failure."""
        # Ranks that lost a peer fail too; a signal, or a refusal, is more likely the cause than their exit code 1.
        first = min(failed, key=lambda rank: (rank.poll() != ExitCode.BAD_INPUT, rank.poll() or 0))
        self._stopping = True
        self._end_children(self._ranks, FAILURE_SECONDS)
        # They may be what the others waited for until that took too long, as for a batch that never came.
        held = [last_words(rank) for rank in self._ranks if rank not in failed and rank.poll() == -signal.SIGKILL]
        advice = "\n".join([*filter(None, held), f"{RESUME_ADVICE} from the newest checkpoint"])
        return child_fault(first, first.poll() or 0, "while training", advice)

    # Ending

    def _stop_ranks(self) -> int:
        self._stopping = True
        self._terminal.say("stopping: the ranks write a checkpoint (once more Ctrl-C ends everything at once)")
        known = self.stop_ranks_seconds + 3 * longest_checkpoint(self._config.run.directory)
        patience = max(known, self._config.checkpoint.stop_seconds)
        self._end_children(self._ranks, patience)
        codes = [rank.poll() for rank in self._ranks]
        if codes and (all(code == ExitCode.DONE for code in codes) or self._is_finished()):
            return ExitCode.DONE  # the last step was made before the request was heard
        if not (self._has_trained() or self._trains_elsewhere()):
            return ExitCode.RESUMABLE  # they were still starting: no signal is handled then, and nothing is lost
        for rank, code in zip(self._ranks, codes, strict=True):
            if code is not None and code != ExitCode.RESUMABLE:
                ended = f"{rank.name} {describe_exit(code)} instead of writing a checkpoint"
                advice = f"; checkpoint.stop_seconds gives ranks more than {patience:.1f} s" if code < 0 else ""
                self._ended = f"{ended}; the newest checkpoint may be older than this stop"
                self._terminal.warn(f"{self._ended}{advice}")
        return ExitCode.RESUMABLE

    def _is_finished(self) -> bool:
        """Says whether this launch made the last step, after which its ranks only tell the controller so."""
        return self._has_trained() and read_summary(self._config.run.directory).get("status") == "finished"

    def _has_trained(self) -> bool:
        """Says whether the summary is of this launch, whose ranks have ended: others may have begun here meanwhile."""
        directory = self._config.run.directory
        return not is_held(directory, "lock") and read_summary(directory) != self._found

    def _end_children(self, children: Sequence[Child], seconds: float) -> None:
        """Sends SIGTERM and waits; then sends SIGKILL and waits for the kernel."""
        for number, patience in ((signal.SIGTERM, seconds), (signal.SIGKILL, _KILL_SECONDS)):
            for child in children:
                child.signal(number)
            if self._wait_for(lambda: all(child.poll() is not None for child in children), patience):
                return

    def _end(self) -> None:
        """Ends whatever is left: the services politely unless a second request to stop comes, the rest at once."""
        seconds = STOP_SERVICES_SECONDS if self._stopping else END_SERVICES_SECONDS
        try:
            self._stopping = True
            self._end_children(self._service_children(), seconds)
        except (StopAsked, KillAsked):
            pass
        stubborn = sweep(self._mark, os.getpid(), spared=self._spared)
        self._terminal.restore()
        if stubborn:
            self._terminal.warn(f"processes {sorted(stubborn)} could not be killed; look after them")

    def _complete_summary(self, *, failed: str = "") -> Mapping[str, Any]:
        restarts = {name: service.restarts for name, service in self._services.items()}
        pool = self._services.get("pool")
        owner_restarts = sum(report.get("owner_restarts", 0) for report in pool.reports()) if pool is not None else 0
        if not self._has_trained():
            return self._found
        ending = ending_of(read_summary(self._config.run.directory), failed=failed, ended=self._ended)
        return add_to_summary(self._config.run.directory, restarts=restarts, owner_restarts=owner_restarts, **ending)

    def _conclude(self, code: int) -> int:
        summary = self._complete_summary()
        if code == ExitCode.DONE:
            self._terminal.say(summary_line(summary))
            self._terminal.say(
                f"files: {self._config.run.directory} (summary.json, metrics.jsonl, checkpoints/, logs/)"
            )
        else:
            lost = f"; {told}" if (told := unsaved(summary)) else ""
            self._terminal.say(f"stopped before the last step; {RESUME_ADVICE}{lost}")
        self._terminal.result(summary)
        self._report()
        # Ranks end with 0 all the same: torchrun would have them train onto the same full disk again.
        return ExitCode.ENVIRONMENT if code == ExitCode.DONE and unsaved(summary) else code

    def _report(self) -> None:
        """Writes the page about the run, if asked for, of a launch that trained; another Ctrl-C gives it up."""
        asked = self._requests.count
        if self._config.run.report and self._has_trained() and asked < _IMPATIENT:
            if line := report_line(self._config.run.directory, unless=lambda: self._requests.count > asked):
                self._terminal.say(line)

    # Waiting

    def _wait_for(self, condition: Callable[[], bool], seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while not (met := condition()) and time.monotonic() < deadline:
            self._tick()
        return met

    def _tick(self) -> None:
        """Sleeps a moment; raises when a request to stop has come."""
        if self._requests.count >= _IMPATIENT:
            raise KillAsked
        if self._requests.count == 1 and not self._stopping:
            raise StopAsked
        reap_orphans([*self._ranks, *self._service_children()])
        time.sleep(_TICK_SECONDS)

    def _service_children(self) -> list[Child]:
        return [service.child for service in self._services.values() if service.child is not None]

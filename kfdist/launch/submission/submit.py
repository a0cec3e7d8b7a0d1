"""`kfdist submit`: checks what can be checked from afar, starts a Ray job, and says how it goes."""

import asyncio
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from kfdist.config import Config, to_toml
from kfdist.errors import ConfigError, EnvironmentFault, ExitCode, KfdistError
from kfdist.launch.submission.request import Submission
from kfdist.launch.submission.room import check_room
from kfdist.launch.submission.storage import parse_storage
from kfdist.pool.bundles import Node
from kfdist.pool.ray_cluster import set_auth_mode

ENTRYPOINT = "python -m kfdist ray-job"
_RUN_KEY = "kfdist_run"
"""Job metadata: the run's name."""

_STARTED = "files in"
"""What a launch says once it has checked everything."""

_START_SECONDS = 120.0
_POLL_SECONDS = 0.5
_LAST_LINES = 15


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a user asks for, beside the configuration.

    Attributes:
        address: The dashboard's, http://HOST:PORT.
        gpus_per_worker: GPUs of each rank.
        max_failures: How often all ranks may be started again.
        storage: Where Ray Train keeps its copies of checkpoints; None: in the run directory.
        working_dir: Directory with code for the job; None: what is installed.
        follow: Whether to show the job's log until it ends.
    """

    address: str
    gpus_per_worker: int
    max_failures: int
    storage: str | None
    working_dir: Path | None
    follow: bool


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job, and how it stands.

    Attributes:
        submission_id: Ray's name for it.
        status: Ray's word.
        code: The exit code that it stands for; None while it lives.
    """

    submission_id: str
    status: str
    code: int | None


def submit(config: Config, request: Request, stream: TextIO) -> Job:
    """Starts a job for a run, or follows the one that is there.

    Args:
        config: The run's configuration.
        request: How it is to be run.
        stream: Where to say how it goes.

    Returns:
        The job: started, or with `follow` ended.

    Raises:
        ConfigError: A value is wrong. There is no job.
        EnvironmentFault: The cluster can't be reached or is too small, the job failed, or can't be followed to its end.
    """
    checked(config, request)
    client = _connect(request.address)
    try:
        return _submit(client, config, request, lambda text: print(text, end="", file=stream, flush=True))
    except KfdistError:
        raise
    except Exception as error:  # whatever Ray's HTTP libraries raise
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise EnvironmentFault(
            f"Ray at {request.address} doesn't answer any more ({reason}); a job that was started may go on: the same "
            "command follows it with --follow"
        ) from error


def _submit(client: Any, config: Config, request: Request, say: Callable[[str], None]) -> Job:
    name = _new_name(client, config.run.name)
    if (living := _living_job(client, config.run.name)) is not None:
        return _join(client, living, config.run.name, request, say)
    check_room(*_nodes(request.address), config, request.gpus_per_worker)
    try:
        _start(client, name, config, request)
    except Exception:
        # Ray refuses a name that it has: whoever submitted the run at the same time was first.
        if (living := _living_job(client, config.run.name)) is None:
            raise
        return _join(client, living, config.run.name, request, say)
    say(f"job {name}: ray job logs|status|stop {name} --address {request.address}\n")
    if request.follow:
        return _follow(client, name, say)
    return _started(client, name, say)


def _join(client: Any, living: str, run: str, request: Request, say: Callable[[str], None]) -> Job:
    if not request.follow:
        raise EnvironmentFault(
            f"run {run!r} is being trained by job {living}; follow it with --follow, or end it first: "
            f"ray job stop {living} --address {request.address}"
        )
    say(f"run {run} is being trained already, by job {living}\n")
    return _follow(client, living, say)


def checked(config: Config, request: Request) -> Config:
    """Checks what needs no cluster.

    Raises:
        ConfigError: A value is wrong.
    """
    if not re.match(r"https?://[^/\s]+$", request.address.rstrip("/")):
        raise ConfigError(
            f"is {request.address!r}; write the dashboard's address, such as http://HEAD:8265", path="--ray"
        )
    if not config.run.directory.is_absolute():
        raise ConfigError(
            f"is {str(config.run.directory)!r}; on a cluster give an absolute path, one that all nodes share or have "
            "on disks of their own",
            path="run.dir",
        )
    if request.gpus_per_worker not in (0, 1):
        raise ConfigError(
            f"is {request.gpus_per_worker}; a rank computes on one GPU, so it is 1, or 0 for the CPU: for more GPUs "
            "ask for more --workers",
            path="--gpus-per-worker",
        )
    wanted, given = config.run.device, "cuda" if request.gpus_per_worker else "cpu"
    if wanted not in ("auto", given):
        raise ConfigError(
            f'is "{wanted}", and --gpus-per-worker is {request.gpus_per_worker}; make it "{given}" or "auto", or '
            f"--gpus-per-worker {0 if request.gpus_per_worker else 1}",
            path="run.device",
        )
    if request.working_dir is not None and not request.working_dir.is_dir():
        raise ConfigError(f"is {str(request.working_dir)!r}, no directory", path="--working-dir")
    if request.storage is not None:
        parse_storage(request.storage)
    return config.model_copy(update={"run": config.run.model_copy(update={"device": given})})


def _connect(address: str) -> Any:
    set_auth_mode()
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except Exception as error:  # Ray raises whatever its HTTP library does, and bare ones
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise EnvironmentFault(
            f"no Ray answers at {address} ({reason}); give the dashboard's address, which `ray start --head` prints; "
            "a cluster with a token needs RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH"
        ) from None


def _living_job(client: Any, run: str) -> str | None:
    for job in client.list_jobs():
        if (job.metadata or {}).get(_RUN_KEY) == run and job.submission_id and not job.status.is_terminal():
            return job.submission_id
    return None


def _new_name(client: Any, run: str) -> str:
    """Returns a name for a job: the next of the run's, so that of two submissions at the same time one is refused."""
    before = f"kfdist-{run}-"
    names = [job.submission_id or "" for job in client.list_jobs()]
    numbers = [name.removeprefix(before) for name in names if name.startswith(before)]
    return f"{before}{1 + max((int(number) for number in numbers if number.isdecimal()), default=0)}"


def _nodes(address: str) -> tuple[list[Node], str]:
    """Returns the living nodes, as Ray's drivers see them, and the head's address."""
    from ray.util.state import list_nodes

    listed: list[Any] = list_nodes(address=address, detail=True, limit=10_000)
    nodes: list[Node] = [
        {"Resources": node.resources_total, "Labels": node.labels or {}, "NodeManagerAddress": node.node_ip}
        for node in listed
        if node.state == "ALIVE"
    ]
    return nodes, next((node.node_ip for node in listed if node.is_head_node), "")


def _start(client: Any, name: str, config: Config, request: Request) -> None:
    submission = Submission(
        config=to_toml(checked(config, request)),
        gpus_per_worker=request.gpus_per_worker,
        max_failures=request.max_failures,
        storage=str(config.run.directory / "ray-train") if request.storage is None else parse_storage(request.storage),
    )
    environment: dict[str, Any] = {"env_vars": submission.variables()}
    if request.working_dir is not None:
        environment["working_dir"] = str(request.working_dir)
    client.submit_job(
        entrypoint=ENTRYPOINT,
        submission_id=name,
        runtime_env=environment,
        metadata={_RUN_KEY: config.run.name},
    )


def _started(client: Any, name: str, say: Callable[[str], None]) -> Job:
    """Waits until a job has checked everything and begins, or has ended."""
    deadline = time.monotonic() + _START_SECONDS
    while not (status := client.get_job_status(name)).is_terminal():
        lines = client.get_job_logs(name).splitlines()
        begun = next((line for line in lines if line.startswith("run ") and _STARTED in line), None)
        if begun is not None or time.monotonic() > deadline:
            late = f"the job hasn't begun within {_START_SECONDS:g} s; it goes on"
            say(f"{begun or late}\n")
            return Job(submission_id=name, status=str(status.value), code=None)
        time.sleep(_POLL_SECONDS)
    job = _ended(client, name)
    say(client.get_job_logs(name))  # it had nothing to do, which it says
    return job


def _follow(client: Any, name: str, say: Callable[[str], None]) -> Job:
    async def follow() -> None:
        async for lines in client.tail_job_logs(name):
            say(lines)

    asyncio.run(follow())
    # Ray closes the log a moment before it knows how the job ended.
    deadline = time.monotonic() + _START_SECONDS
    while not client.get_job_status(name).is_terminal():
        if time.monotonic() > deadline:
            raise EnvironmentFault(f"Ray ended the log of job {name}, which goes on; the same command follows it again")
        time.sleep(_POLL_SECONDS)
    return _ended(client, name, shown=True)


def _ended(client: Any, name: str, *, shown: bool = False) -> Job:
    """Returns a job that has ended well or was stopped.

    Raises:
        ConfigError, EnvironmentFault: It failed; in its own words.
    """
    info = client.get_job_info(name)
    status = str(info.status.value)
    if status == "SUCCEEDED":
        return Job(submission_id=name, status=status, code=ExitCode.DONE)
    if status == "STOPPED":
        return Job(submission_id=name, status=status, code=ExitCode.RESUMABLE)
    raise job_fault(name, info.driver_exit_code, client.get_job_logs(name), info.message or "", shown=shown)


def job_fault(
    name: str, code: int | None, logs: str, message: str, *, shown: bool = False
) -> ConfigError | EnvironmentFault:
    """Returns why a job failed: in its launch's words where it wrote any, else the end of its log.

    Args:
        name: The job's.
        code: Its exit code, if it came to one.
        logs: Its log.
        message: Ray's.
        shown: Whether the user has seen the log.
    """
    _, marker, words = f"\n{logs}".rpartition("\nkfdist: ")
    words = words.strip() if marker else ""
    if words and code == ExitCode.BAD_INPUT:
        return ConfigError(words)
    if words and code == ExitCode.ENVIRONMENT:
        return EnvironmentFault(f"{words.splitlines()[0] if shown else words}\n(said by job {name})")
    failed = f"job {name} failed" + (f" with {code}" if code is not None else "")
    if shown and logs.strip():
        return EnvironmentFault(f"{failed}; its log is above")
    last = logs.strip().splitlines()[-_LAST_LINES:] or message.strip().splitlines()[-_LAST_LINES:]
    return EnvironmentFault("\n".join([f"{failed}:", *last]))


def as_json(job: Job, run: str) -> str:
    """Returns a job for programs."""
    return json.dumps({"run": run, "submission_id": job.submission_id, "status": job.status, "code": job.code})

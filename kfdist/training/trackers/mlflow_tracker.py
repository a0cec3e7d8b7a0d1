"""MLflow: one run of it for a run of ours, however often that is resumed."""

import getpass
import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from typing_extensions import override

from kfdist.system.files import replace_file
from kfdist.training.trackers.tracker import Numbers, Tracker

REFERENCE = "mlflow.json"
"""In the run directory: which run of which server it is, and the last step that it was told of each metric."""

_STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
_SETTINGS_AT_ONCE, _METRICS_AT_ONCE = 100, 1000
"""What a server takes in one request."""
_LONGEST_VALUE = 500


class MlflowTracker(Tracker):
    """Logs metrics and parameters; where to, MLFLOW_TRACKING_URI says, and else files in RUN/mlruns.

    The experiment is MLFLOW_EXPERIMENT_NAME, or the run's name. A run that is resumed at an earlier step tells nothing
    a second time: MLflow would keep both, and draw spikes.

    Args:
        directory: The run directory.
        name: The run's name.
    """

    def __init__(self, directory: Path, name: str) -> None:
        self._directory = directory
        self._name = name
        self._client: Any = None
        self._id = ""
        self._begun = int(time.time() * 1000)  # numbers come later, and MLflow's import takes seconds
        self._reference: dict[str, Any] = {}
        self._known: Mapping[str, int] = {}

    @override
    def start(self, config: Mapping[str, Any], step: int) -> None:
        del step
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        place = os.environ.get("MLFLOW_TRACKING_URI") or ""
        if not place:
            place = (self._directory / "mlruns").absolute().as_uri()
            os.environ.setdefault(
                "MLFLOW_ALLOW_FILE_STORE", "true"
            )  # else files, being all that a run has, are refused
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(tracking_uri=place)
        self._id = self._former(place)
        if self._id:
            self._client.update_run(self._id, status="RUNNING")
            return
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME") or self._name
        known = self._client.get_experiment_by_name(experiment)
        where = known.experiment_id if known is not None else self._client.create_experiment(experiment)
        run = self._client.create_run(where, start_time=self._begun, run_name=self._name, tags=self._tags())
        self._id = run.info.run_id
        self._reference = {"tracking_uri": place, "run_id": self._id, "last_steps": {}}
        self._write_reference()
        self._log_settings(config)

    def _tags(self) -> dict[str, str]:
        """Returns what MLflow shows of where a run comes from."""
        tags = {
            "mlflow.source.name": "kfdist",
            "mlflow.source.type": "LOCAL",
            "kfdist.directory": str(self._directory.absolute()),
        }
        with suppress(KeyError, OSError):  # a container's user may have no name
            tags["mlflow.user"] = getpass.getuser()
        return tags

    def _former(self, place: str) -> str:
        """Returns the id of the run that an earlier start made there; empty if there is none, or none any more."""
        from mlflow.exceptions import MlflowException

        try:
            reference = json.loads((self._directory / REFERENCE).read_text(encoding="utf-8"))
            found, there = reference["run_id"], reference["tracking_uri"]
        except (OSError, ValueError, KeyError, TypeError):
            return ""
        if there != place:
            return ""
        try:
            if self._client.get_run(found).info.lifecycle_stage != "active":
                return ""
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return ""
        self._reference = {"last_steps": {}, **reference}
        self._known = dict(self._reference["last_steps"])
        return found

    def _write_reference(self) -> None:
        replace_file(self._directory / REFERENCE, json.dumps(self._reference).encode())

    def _log_settings(self, config: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        settings = [Param(key, str(value)[:_LONGEST_VALUE]) for key, value in config.items()]
        for first in range(0, len(settings), _SETTINGS_AT_ONCE):
            self._client.log_batch(self._id, params=settings[first : first + _SETTINGS_AT_ONCE])

    @override
    def log(self, numbers: Sequence[Numbers]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        new = [
            Metric(name, value, now, step)
            for step, values in numbers
            for name, value in values.items()
            if step > self._known.get(name, -1)
        ]
        for first in range(0, len(new), _METRICS_AT_ONCE):
            self._client.log_batch(self._id, metrics=new[first : first + _METRICS_AT_ONCE])
        self._reference["last_steps"].update((metric.key, metric.step) for metric in new)
        self._write_reference()

    @override
    def close(self, status: str) -> None:
        self._client.set_terminated(self._id, status=_STATUS.get(status, "KILLED"))

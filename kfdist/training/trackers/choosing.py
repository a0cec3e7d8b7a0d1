"""The trackers that a configuration names."""

from kfdist.config import Config
from kfdist.training.run_directory import flat
from kfdist.training.run_state import Standing
from kfdist.training.trackers.mlflow_tracker import MlflowTracker
from kfdist.training.trackers.tensorboard_tracker import TensorBoardTracker
from kfdist.training.trackers.tracker import Tracker, TrackerFeed


def make_trackers(config: Config | None, standing: Standing) -> TrackerFeed:
    """Makes what a run's numbers are told to.

    Args:
        config: The configuration; None on ranks other than 0, which tell nothing.
        standing: How far the run has come.
    """
    if config is None:
        return TrackerFeed({}, {}, standing.step)
    directory = config.run.directory
    made: dict[str, Tracker] = {}
    if "tensorboard" in config.run.trackers:
        made["TensorBoard"] = TensorBoardTracker(directory)
    if "mlflow" in config.run.trackers:
        made["MLflow"] = MlflowTracker(directory, config.run.name)
    return TrackerFeed(made, flat(config.model_dump()), standing.step)

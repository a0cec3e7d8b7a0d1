"""The end of Python's own fork server, which tests' ranks and loader processes come from."""

from multiprocessing import forkserver, resource_tracker


def stop_fork_server() -> None:
    """Ends this process's fork server and its resource tracker, which would otherwise live until its exit."""
    forkserver._forkserver._stop()  # pyright: ignore[reportAttributeAccessIssue]
    resource_tracker._resource_tracker._stop()  # pyright: ignore[reportAttributeAccessIssue]

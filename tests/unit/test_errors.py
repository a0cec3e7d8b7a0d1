"""Errors keep message and path apart, so that a path can be written as the user wrote it."""

from kfdist.errors import ConfigError


def test_a_path_is_moved_and_the_message_stays():
    error = ConfigError("0 is not allowed", path="rank")
    assert (error.message, error.path, str(error)) == ("0 is not allowed", "rank", "rank: 0 is not allowed")
    below = error.under("preconditioner.settings")
    assert str(below) == "preconditioner.settings.rank: 0 is not allowed"
    assert str(error.at("inner")) == "inner: 0 is not allowed"


def test_without_a_path_the_prefix_is_the_path():
    error = ConfigError("nothing fits")
    assert str(error) == "nothing fits" and error.path == ""
    assert str(error.under("preconditioner")) == "preconditioner: nothing fits"

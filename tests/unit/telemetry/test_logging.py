"""Logging is set up once, on kfdist's logger alone."""

import io
import json
import logging

import pytest

from kfdist.telemetry.logging import setup_logging


def test_plain_lines_carry_the_fields():
    stream = io.StringIO()
    setup_logging(stream=stream, fields={"run": "50%s", "rank": 3})
    logging.getLogger("kfdist.part").info("block %s is stale", "fc1")
    logging.getLogger("kfdist.part").debug("not shown")
    assert stream.getvalue().endswith("INFO run=50%s rank=3 kfdist.part: block fc1 is stale\n")
    assert stream.getvalue().count("\n") == 1


def test_json_lines_carry_fields_extras_and_exceptions():
    stream = io.StringIO()
    setup_logging(stream=stream, as_json=True, fields={"run": "digits"}, level="DEBUG")
    logger = logging.getLogger("kfdist.part")
    logger.debug("first\nsecond", extra={"step": 7})
    try:
        raise ValueError("bad")
    except ValueError:
        logger.exception("failed")
    first, second = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert (first["message"], first["step"], first["run"], first["level"]) == ("first\nsecond", 7, "digits", "DEBUG")
    assert first["time"].endswith("+00:00")
    assert "ValueError: bad" in second["exception"]


def test_setting_up_again_replaces_and_leaves_others_alone():
    root = logging.getLogger().handlers[:]
    other = logging.NullHandler()
    logging.getLogger("kfdist").addHandler(other)
    streams = [io.StringIO(), io.StringIO()]
    for stream in streams:
        setup_logging(stream=stream)
    logging.getLogger("kfdist").warning("once")
    assert (streams[0].getvalue(), streams[1].getvalue().count("once")) == ("", 1)
    assert other in logging.getLogger("kfdist").handlers
    assert logging.getLogger().handlers == root


def test_an_unknown_level_is_refused():
    with pytest.raises(ValueError, match="LOUD"):
        setup_logging(level="LOUD")

import sys

import torch

from kfdist.system.provenance import hardware, processor_field, versions


def test_versions_are_found_without_imports():
    before = set(sys.modules)
    assert versions()["torch"] == torch.__version__
    assert set(sys.modules) - before <= {"importlib.metadata"}


def test_the_processor_says_who_made_it():
    assert processor_field("vendor_id", "CPU implementer")
    assert processor_field("no such field") == ""


def test_hardware_has_no_gaps():
    assert all(hardware().values())
    assert int(hardware()["CPUs"]) >= 1

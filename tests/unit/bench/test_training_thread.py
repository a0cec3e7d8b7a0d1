"""What is counted of the thread that trains."""

import cProfile
import hashlib
import subprocess

import pytest
import torch

from kfdist.bench import stall
from kfdist.bench.training_thread import CopyCounter, kind_of
from kfdist.curvature.jobs import decode_result, job_parts


class Part:
    def verb(self, tensor: torch.Tensor, *, twice: bool) -> torch.Tensor:
        return tensor.clone().clone() if twice else tensor + 1


def test_copies_count_inside_the_method_alone():
    part, copies, tensor = Part(), CopyCounter(), torch.zeros(5, dtype=torch.float64)
    with copies.counting(part, "verb"):
        assert torch.equal(part.verb(tensor, twice=False), tensor + 1) and copies.bytes == 0
        part.verb(tensor, twice=True)
        tensor.clone()
    part.verb(tensor, twice=True)
    assert copies.bytes == 80


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (job_parts.__code__, "encodes"),
        (decode_result.__code__, "decodes results"),
        ("<built-in method _hashlib.openssl_sha256>", "hashes"),
        (subprocess.run.__code__, None),
        (stall.measure_stall.__code__, None),
        ("<method 'append' of 'list' objects>", None),
    ],
)
def test_functions_have_their_kind(code, kind: str | None):
    assert kind_of(code) == kind


def test_the_profiles_names_of_hashes_are_still_those():

    profile = cProfile.Profile()
    profile.enable()
    hashlib.sha256(b"payload").hexdigest()
    profile.disable()
    assert sum(kind_of(entry.code) == "hashes" for entry in profile.getstats()) == 2

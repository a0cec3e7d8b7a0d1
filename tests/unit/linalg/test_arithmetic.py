"""Precisions of products: what is switched on for a GPU's sums stays there."""

from collections.abc import Iterator

import pytest
import torch

from kfdist.curvature.jobs import fingerprint
from kfdist.linalg.arithmetic import fast_products, product_precision
from kfdist.linalg.gram import products_are_exact

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def precision_restored() -> Iterator[None]:
    yield
    torch.backends.cuda.matmul.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")


def test_a_gpus_products_are_shortened_inside_and_the_hosts_never() -> None:
    before = [product_precision(each) for each in (CPU, GPU)]
    assert before == ["ieee", "ieee"]
    with fast_products(GPU):
        assert product_precision(GPU) == "tf32" and not products_are_exact(GPU)
        assert product_precision(CPU) == "ieee" and products_are_exact(CPU), "another thread may be inverting"
        torch.get_float32_matmul_precision()  # raises where torch's older and newer settings disagree
    assert [product_precision(each) for each in (CPU, GPU)] == before
    with fast_products(CPU):
        assert product_precision(GPU) == "ieee"


def test_who_has_shortened_them_by_torchs_newer_setting_keeps_it() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    with pytest.raises(RuntimeError, match="mix of the legacy and new APIs"):
        torch.get_float32_matmul_precision()
    with fast_products(GPU):
        assert product_precision(GPU) == "tf32"
    assert product_precision(GPU) == "tf32" and not products_are_exact(GPU)
    assert products_are_exact(CPU) and "matmul=ieee" in fingerprint("cpu", 1)


@pytest.mark.parametrize(("word", "of_the_host"), [("high", "tf32"), ("medium", "bf16")])
def test_the_older_setting_is_for_all_devices(word: str, of_the_host: str) -> None:
    torch.set_float32_matmul_precision(word)
    assert product_precision(CPU) == of_the_host and product_precision(GPU) == "tf32"
    assert not products_are_exact(CPU)
    with fast_products(GPU):
        pass
    assert torch.get_float32_matmul_precision() == word

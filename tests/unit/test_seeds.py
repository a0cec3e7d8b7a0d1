"""Pinned: a release that drew other seeds would draw other sketches than its replicas, and resume other runs."""

from kfdist.seeds import block_seed, rank_seed, seed_from, split_seed


def test_seeds_never_change() -> None:
    assert seed_from("") == 8203414616412130826
    assert seed_from("kfdist sampler 0 1") == 284486378694749010
    assert seed_from("kfdist rank 3 1 0") == 8065091657138682926
    assert block_seed(3, "features.0", 100) == 5984312534005149841
    assert rank_seed(block_seed(3, "features.0", 100), 2) == 2604220951613654130
    assert split_seed(0, "sketch/A") == 6643088676517621976


def test_seeds_are_apart_and_fit_every_generator() -> None:
    assert len({split_seed(seed, label) for seed in range(50) for label in "AG"}) == 100
    assert len({rank_seed(block_seed(run, "fc", 0), rank) for run in range(5) for rank in range(8)}) == 40
    assert all(0 <= split_seed(seed, "A") < 2**63 for seed in (0, 2**63, -1))

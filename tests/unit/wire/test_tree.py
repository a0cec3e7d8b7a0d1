"""Any nested state becomes one file without pickle, and comes back as it was."""

import contextlib
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from kfdist.wire.tree import entry, outline, pack, unpack


def same(one: object, two: object) -> bool:
    """Equality that tells 1 from 1.0 and True, a list from a tuple, and NaN apart from nothing but itself."""
    if type(one) is not type(two):
        return False
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        return one.dtype == two.dtype and one.shape == two.shape and torch.equal(one.view(-1), two.view(-1))
    if isinstance(one, dict) and isinstance(two, dict):
        return list(one) == list(two) and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(two, list | tuple):
        return len(one) == len(two) and all(same(a, b) for a, b in zip(one, two, strict=True))
    return one == two or (isinstance(one, float) and math.isnan(one) and math.isnan(float(two)))  # type: ignore[arg-type]


tensors = st.builds(
    lambda shape, dtype: torch.arange(math.prod(shape)).reshape(shape).to(dtype),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool]),
)
keys = st.text(max_size=5) | st.sampled_from(["$tensor", "$items", "a/b", "#1", "1", "~"])
leaves = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.binary(max_size=9), tensors
)
states = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(keys, inner, max_size=3),
        st.dictionaries(st.integers(-2, 2) | keys, inner, max_size=3),
    ),
    max_leaves=12,
)


@given(states)
def test_whatever_goes_in_comes_out(state: object):
    assert same(unpack(pack(state)), state)


@given(states)
def test_the_same_state_gives_the_same_bytes(state: object):
    assert pack(state) == pack(unpack(pack(state)))


def test_tensors_that_share_memory_come_back_equal_and_apart():
    base = torch.arange(6.0)
    state = unpack(pack({"a": base, "b": base.view(2, 3), "c": base[2:4], "d": base.view(2, 3).t()}))
    assert torch.equal(state["d"], base.view(2, 3).t())
    state["a"].zero_()
    assert torch.equal(state["b"].flatten(), base)
    assert torch.equal(state["c"], base[2:4])


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_the_state_of_an_optimizer(make: Callable[..., torch.optim.Optimizer]):
    layer = torch.nn.Linear(3, 2)
    optimizer = make(layer.parameters(), lr=0.1)
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = unpack(pack(optimizer.state_dict()))
    assert same(state, optimizer.state_dict())
    fresh = make(torch.nn.Linear(3, 2).parameters(), lr=9.0)
    fresh.load_state_dict(state)
    assert fresh.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize(("state", "place"), [({"a": [object()]}, "/a/0"), ({"a": {1.5: 2}}, "/a"), ({True: 1}, "/")])
def test_what_would_need_pickle_is_refused_by_its_place(state: object, place: str):
    with pytest.raises(TypeError, match=f"at {place} "):
        pack(state)


@pytest.mark.parametrize("content", [b"", b"x", b"\xff" * 8, bytes(8) + b"{}", (10**12).to_bytes(8, "little") + b"{}"])
def test_other_files_are_refused(content: bytes):
    for read in (unpack, outline, lambda content: entry(content, "a")):
        with pytest.raises(ValueError, match="not a state file of kfdist, or damaged"):
            read(content)


def test_files_of_others_are_refused():
    with pytest.raises(ValueError, match="not a state file of kfdist"):
        unpack(save({"a": torch.zeros(1)}))
    with pytest.raises(ValueError, match="nothing says where the tensors a, b belong"):
        unpack(save({"a": torch.zeros(1), "b": torch.zeros(1)}, metadata={"kfdist": "[]"}))


def test_a_tensor_stands_in_one_place():
    # Else a kilobyte could say that a factor is that of ten thousand blocks, each of which gets a copy.
    skeleton = '[{"$tensor":"a"},{"$tensor":"a"}]'
    for share in (False, True):
        with pytest.raises(ValueError, match="'a' is to stand in two places"):
            unpack(save({"a": torch.zeros(1)}, metadata={"kfdist": skeleton}), share=share)


def test_the_outline_is_the_state_without_tensors_and_bytes():
    state = {"a": torch.arange(3), "b": [1, (b"x", 2.5), {"c": None}], 3: {"$odd": math.inf}}
    content = pack(state)
    assert outline(content) == {"a": None, "b": [1, (None, 2.5), {"c": None}], 3: {"$odd": math.inf}}
    length = int.from_bytes(content[:8], "little")
    assert outline(content[: 8 + length]) == outline(content), "it reads the header alone"


def test_an_entry_is_what_a_header_says_and_nothing_made_of_tensors():
    content = pack({"a": "chain", "b": torch.arange(3), "c": [1], "d": 2.5, "e": None, "f": (1,)})
    length = int.from_bytes(content[:8], "little")
    found = {key: entry(content[: 8 + length], key) for key in "abcdefg"}
    assert found == {"a": "chain", "b": None, "c": None, "d": 2.5, "e": None, "f": None, "g": None}
    assert entry(pack([1, 2]), "a") is None


@given(st.binary(max_size=60), st.integers(0, 200))
def test_damage_never_gives_anything_but_a_value_error(junk: bytes, place: int):
    content = bytearray(pack({"a": torch.arange(5), "b": [1, "x", {"c": 2.5}]}))
    content[place : place + len(junk)] = junk
    with contextlib.suppress(ValueError):
        unpack(bytes(content))
    with contextlib.suppress(ValueError):
        outline(bytes(content))

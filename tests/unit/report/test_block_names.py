"""Blocks stay apart on the axes of the report, and long names fit."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kfdist.report.block_names import LABEL_CHARACTERS, short_names

BERT = [
    f"bert.encoder.layer.{layer}.{part}"
    for layer in range(12)
    for part in (
        *(f"attention.self.{each}" for each in ("query", "key", "value")),
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    )
]
RESNET = [
    f"module.backbone.layer{stage}.{block}.{part}"
    for stage in range(1, 5)
    for block in range(6)
    for part in ("conv1", "conv2", "conv3", "downsample.0")
]


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("fc", "fc"),
        ("layer1.0.conv1", "layer1.0.conv1"),
        ("bert.encoder.layer.11.attention.output.dense", "b.e.l.11.a.o.dense"),
        ("model.layers.11.self_attn.q_proj", "m.l.11.s.q_proj"),
        ("module.backbone.layer3.5.downsample.0", "m.b.l3.5.d.0"),
        ("module.backbone.layer3.5.conv1", "m.b.layer3.5.conv1"),
        ("an_only_module_with_a_very_long_name", "an_only…ry_long_name"),
    ],
)
def test_modules_become_letters_from_the_first_on_and_keep_their_numbers(name: str, short: str):
    assert short_names([name]) == [short]


@pytest.mark.parametrize("names", [BERT, RESNET], ids=["bert", "resnet"])
def test_blocks_of_large_models_have_names_of_their_own_that_fit(names: list[str]):
    short = short_names(names)
    assert len(set(short)) == len(names)
    assert max(map(len, short)) <= LABEL_CHARACTERS


def test_where_short_names_would_be_one_more_is_shown():
    of_images = "encoder_of_images.embedding.linear"
    assert short_names([of_images, "extractor.embedding.linear"]) == ["encoder…dding.linear", "extract…dding.linear"]
    assert short_names([of_images, "encoder_of_texts.embedding.linear", "fc"]) == [
        of_images,
        "encoder_of_texts.embedding.linear",
        "fc",
    ]


@given(st.lists(st.text("ab.1", min_size=1, max_size=60), unique=True))
def test_no_two_blocks_have_one_name(names: list[str]):
    assert len(set(short_names(names))) == len(names)

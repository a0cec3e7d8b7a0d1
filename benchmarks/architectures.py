"""Real architectures with a batch of real data each: torchvision's on digits, transformers' on the text of a licence.

Weights are random, the language models small (hidden size 128), the image models as torchvision makes them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kfdist.vision import import_torchvision

Loss = Callable[[nn.Module], Tensor]
"""A model's training loss on one batch."""

TEXT = Path(__file__).parents[1] / "LICENSE"
EXAMPLES, LENGTH, CLASSES, BYTES = 8, 32, 10, 256


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A model that users train.

    Attributes:
        name: As its library calls it.
        least_share: Of its parameters, what has to be preconditioned.
        build: Makes it, initialised from torch's global generator.
        batch: Makes the loss on a batch drawn from torch's global generator.
        learning_rate: Of SGD with momentum 0.9.
    """

    name: str
    least_share: float
    build: Callable[[], nn.Module]
    batch: Callable[[], Loss]
    learning_rate: float = 0.01


@cache
def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits  # here: with scipy it takes a second of each process that collects tests

    digits: Any = load_digits()
    return torch.tensor(digits.images, dtype=torch.float32) / 16, torch.tensor(digits.target)


@cache
def _text() -> Tensor:
    return torch.tensor(list(TEXT.read_bytes()))


def _images(size: int, examples: int = EXAMPLES) -> Loss:
    images, labels = _digits()
    chosen = torch.randperm(len(images))[:examples]
    x = F.interpolate(images[chosen, None].expand(-1, 3, -1, -1), size=(size, size), mode="bilinear")
    y = labels[chosen]

    def loss(model: nn.Module) -> Tensor:
        output = model(x)
        if isinstance(output, Tensor):
            return F.cross_entropy(output, y)
        return F.cross_entropy(output.logits, y) + 0.3 * F.cross_entropy(output.aux_logits, y)  # Inception's two heads

    return loss


def _lines(length: int = LENGTH) -> Tensor:
    starts = torch.randint(len(_text()) - length, (EXAMPLES,))
    return torch.stack([_text()[start : start + length] for start in starts])


def _language() -> Loss:
    ids = _lines()
    return lambda model: model(input_ids=ids, labels=ids).loss


def _masked() -> Loss:
    ids = _lines()
    hidden = torch.rand(ids.shape) < 0.3
    given, labels = ids.masked_fill(hidden, 0), ids.masked_fill(~hidden, -100)
    return lambda model: model(input_ids=given, labels=labels).loss


def _speech() -> Loss:
    spectrum, ids = torch.randn(EXAMPLES, 16, 100), _lines(12)
    return lambda model: model(input_features=spectrum, labels=ids).loss


def _sequences(layer: Callable[..., nn.RNNBase]) -> Callable[[], nn.Module]:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows = layer(8, 64, num_layers=2, batch_first=True)
            self.head = nn.Linear(64, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rows(x)[0][:, -1])

    return Reader


def _rows_of_digits() -> Loss:
    images, labels = _digits()
    chosen = torch.randperm(len(images))[:EXAMPLES]
    return lambda model: F.cross_entropy(model(images[chosen]), labels[chosen])


def _vision(name: str, size: int = 64, **arguments: Any) -> Architecture:
    def build() -> nn.Module:
        import_torchvision()
        from torchvision import models

        return getattr(models, name)(num_classes=CLASSES, **arguments)

    return Architecture(name=name, least_share=0.99, build=build, batch=lambda: _images(size))


@dataclass(frozen=True)
class _Transformer:
    """A class of transformers with its configuration, imported when it is built."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    batch: Callable[[], Loss] = _language

    def build(self) -> nn.Module:
        import_torchvision()  # transformers imports it
        import transformers

        kind: Any = getattr(transformers, self.name)
        return kind(kind.config_class(vocab_size=BYTES, **self.settings))

    def architecture(self) -> Architecture:
        return Architecture(name=self.name, least_share=0.95, build=self.build, batch=self.batch)


_HEADS = {"num_hidden_layers": 2, "num_attention_heads": 4}
_ENCODER_DECODER = {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in
                    (("layers", 2), ("attention_heads", 4), ("ffn_dim", 256))}  # fmt: skip

ARCHITECTURES: Mapping[str, Architecture] = {
    each.name: each
    for each in (
        _vision("resnet18", size=32),
        _vision("resnet50"),
        _vision("vgg16_bn"),
        _vision("densenet121"),
        _vision("convnext_tiny"),
        _vision("swin_t"),
        _vision("swin_v2_t"),
        _vision("vit_b_16", image_size=64),
        _vision("inception_v3", size=299, init_weights=True),  # the least that its second head takes
        _vision("efficientnet_b0"),
        _vision("regnet_y_400mf"),
        _vision("mobilenet_v3_small", size=32),
        _Transformer("GPT2LMHeadModel", {"n_positions": 64, "n_embd": 128, "n_layer": 2, "n_head": 4}).architecture(),
        _Transformer(
            "LlamaForCausalLM",
            {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 2, **_HEADS},
        ).architecture(),
        _Transformer(
            "BertForMaskedLM", {"hidden_size": 128, "intermediate_size": 256, **_HEADS}, _masked
        ).architecture(),
        _Transformer(
            "T5ForConditionalGeneration",
            {"d_model": 128, "d_ff": 256, "d_kv": 32, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
        ).architecture(),
        _Transformer(
            "MixtralForCausalLM",
            {
                "hidden_size": 128,
                "intermediate_size": 128,
                "num_key_value_heads": 2,
                "num_local_experts": 4,
                **_HEADS,
            },
        ).architecture(),
        _Transformer("MambaForCausalLM", {"hidden_size": 128, "num_hidden_layers": 2, "state_size": 8}).architecture(),
        _Transformer(
            "WhisperForConditionalGeneration",
            {
                "d_model": 128,
                "num_mel_bins": 16,
                "max_source_positions": 50,
                "max_target_positions": 32,
                "pad_token_id": 0,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "decoder_start_token_id": 1,
                **_ENCODER_DECODER,
            },
            _speech,
        ).architecture(),
        Architecture(name="LSTM", least_share=0.9, build=_sequences(nn.LSTM), batch=_rows_of_digits),
        Architecture(name="GRU", least_share=0.9, build=_sequences(nn.GRU), batch=_rows_of_digits),
    )
}
"""By name."""

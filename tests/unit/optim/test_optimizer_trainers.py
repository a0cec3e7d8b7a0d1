"""`kfdist.Optimizer` in other loops: Hugging Face's Trainer with a small transformer, and one like Lightning's."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import kfdist
from kfdist.vision import import_torchvision
from tests.support.optimizing import optimizer_of, small_model
from tests.support.preconditioning import rows

pytest.importorskip("accelerate", reason="Hugging Face's Trainer needs it")
import_torchvision()  # transformers imports it by itself, and may fail at that
transformers: Any = pytest.importorskip("transformers")


class Tokens(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Numbers that count up from anywhere, which can be learned."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = (index + torch.arange(6)) % 20
        return {"input_ids": tokens, "labels": tokens}


def language_model() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def hugging_face(directory: Path, steps: int, resume: bool = False) -> tuple[list[torch.Tensor], Any]:
    """Trains with the Trainer's own clipping, accumulation, schedule, decay groups and checkpoints."""
    model = language_model()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = kfdist.Optimizer(
        model,
        lr=3e-2,
        params=[{"params": decayed}, {"params": others, "weight_decay": 0.0}],
        factor_period=1,
        inverse_period=2,
        adoption=kfdist.FixedLag(0),
    )
    arguments = transformers.TrainingArguments(
        output_dir=str(directory),
        max_steps=steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_grad_norm=1.0,
        save_steps=3,
        logging_steps=1,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=Tokens(), optimizers=(optimizer, None))
    with optimizer:
        trainer.train(resume_from_checkpoint=resume)
        assert optimizer.preconditioner.next_step == steps
        assert optimizer.preconditioner.coverage().share > 0.5
    return [p.detach() for p in model.parameters()], trainer.state.log_history


def test_hugging_faces_trainer_trains_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole, history = hugging_face(tmp_path / "whole", 6)
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses[-1] < losses[0]
    hugging_face(tmp_path / "parts", 3)
    parts, _ = hugging_face(tmp_path / "parts", 6, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


class Lightning:
    """What Lightning does around an optimizer: its own wrapper of it, and a closure with forward and backward."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def step(self, closure: Any) -> None:
        self.optimizer.step(closure=closure)


@pytest.mark.parametrize("schedule", [False, True])
def test_a_loop_like_lightnings_gives_the_steps_of_a_plain_one(schedule: bool) -> None:
    found = []
    for by_closure in (False, True):
        model = small_model()
        with optimizer_of(model, skip=("2",)) as optimizer:
            scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=8) if schedule else None
            for seed in range(4):
                x, y = rows(seed=seed)

                def closure(model: nn.Module = model, x: Any = x, y: Any = y, own: Any = optimizer) -> torch.Tensor:
                    loss = nn.functional.cross_entropy(model(x), y)
                    own.zero_grad()
                    loss.backward()
                    return loss

                if by_closure:
                    Lightning(optimizer).step(closure)
                else:
                    closure()
                    optimizer.step()
                if scheduler is not None:
                    scheduler.step()
        found.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))

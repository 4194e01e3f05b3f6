"""`infovla bench train` and `memory`: the contestants are what they are called. No time is asserted."""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_policy import tiny_policy

from infovla_peft.adapters import add_adapter
from infovla_peft.cli import main
from infovla_peft.config import InfoVLAConfig
from infovla_peft.memory import ReplayMemory
from infovla_peft.speed import workload as workloads
from infovla_peft.speed.allocation import PeakMemory, resident_memory
from infovla_peft.speed.naive import NaiveInfoVLATrainer
from infovla_peft.speed.stepping import SteppedTraining
from infovla_peft.speed.training import make_trainer
from infovla_peft.speed.workload import Workload
from infovla_peft.trainer import InfoVLATrainer

SMALL = {"image_size": 32, "vision_width": 16, "vision_depth": 2, "hidden_size": 32, "layers": 2, "heads": 2}


@pytest.fixture
def options(monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """A shape that takes milliseconds."""
    monkeypatch.setitem(workloads.SHAPES, "tiny", SMALL)
    return argparse.Namespace(batch_size=8, shape="tiny", decoding="autoregressive", device="cpu", repetitions=1)


def stage(cls: type[InfoVLATrainer], folder: Path, **options: Any) -> InfoVLATrainer:
    torch.manual_seed(0)
    policy = tiny_policy(autoregressive=True, frames=40)  # hardly ever is one drawn twice for a batch
    config = InfoVLAConfig(
        output_dir=str(folder), method="infovla_paper", use_cpu=True, max_steps=4, per_device_train_batch_size=8,
        lora_r=4, image_shift=0, save_strategy="no", logging_steps=1, disable_tqdm=True, report_to=[], **options,
    )  # fmt: skip
    memory = ReplayMemory().add(policy.task("open_the_drawer")).add(policy.task("turn_on_the_stove"))
    model = add_adapter(policy.model, "one", config)
    dataset = policy.dataset.like(policy.task("put_the_bowl_on_the_plate"))
    return cls(model, config, dataset, policy.collator, memory=memory)


def test_the_naive_reference_computes_the_same_losses(tmp_path: Path) -> None:
    """Our trainer, told to do what the paper says, and the reference that is written down naively."""
    entries = []
    for cls in (InfoVLATrainer, NaiveInfoVLATrainer):
        trainer = stage(cls, tmp_path / cls.__name__)
        trainer.train()
        entries.append([entry for entry in trainer.state.log_history if "rac" in entry])
    assert len(entries[0]) == 4
    for ours, naive in zip(*entries, strict=True):
        for name in ("loss", "policy_loss", "rac", "cmi", "grad_norm"):
            assert naive[name] == pytest.approx(ours[name], rel=1e-4, abs=1e-6), name


def test_the_naive_reference_holds_a_second_model_and_asks_it_in_every_step(tmp_path: Path) -> None:
    trainer = stage(NaiveInfoVLATrainer, tmp_path)
    assert isinstance(trainer, NaiveInfoVLATrainer)
    asked: list[int] = []
    trainer.frozen.register_forward_hook(lambda _module, _inputs, output: asked.append(len(output.hidden_states)))
    trainer.train()
    assert asked == [3] * 4  # two layers and the embeddings
    assert not any(parameter.requires_grad for parameter in trainer.frozen.parameters())
    student: Any = trainer.model
    assert resident_memory(student, trainer.frozen) > 1.9 * resident_memory(student)


def test_a_stepped_training_is_the_training(tmp_path: Path) -> None:
    whole, stepped = stage(InfoVLATrainer, tmp_path / "whole"), stage(InfoVLATrainer, tmp_path / "stepped")
    whole.train()
    entered: list[int] = []

    class Entered(nullcontext[None]):
        def __enter__(self) -> None:
            entered.append(stepped.state.global_step)

    with SteppedTraining(stepped) as training:
        for step in (1, 2, 3):
            assert stepped.state.global_step == step
            training.step(Entered)
    assert entered == [1, 2, 3]
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (whole, stepped)]
    assert losses[0] == losses[1]
    with pytest.raises(RuntimeError, match="ended after 4 steps"):
        training.step()


def test_an_error_of_a_training_comes_out_of_its_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = stage(InfoVLATrainer, tmp_path)
    monkeypatch.setattr(trainer, "compute_loss", lambda *_args, **_options: 1 / 0)
    with pytest.raises(ZeroDivisionError), SteppedTraining(trainer):
        pass


def test_peak_memory_is_exact() -> None:
    with PeakMemory() as memory:
        first = torch.zeros(1000)
        second = first + first  # 8000 bytes live
        del first
        second = second + second  # again
    assert memory.peak == 8000
    assert resident_memory([second, second[:10]]) == 4000


def test_contestants_see_equal_batches(options: argparse.Namespace, tmp_path: Path) -> None:
    workload = Workload(100, decoding=options.decoding)
    assert len(set(workload.instructions)) == 101
    trainers = {name: make_trainer(name, workload, str(tmp_path), options) for name in ("er", "infovla_100_tasks")}
    batches = {name: next(iter(trainer.get_train_dataloader())) for name, trainer in trainers.items()}
    shapes = [{key: value.shape for key, value in batch.items() if key != "replay"} for batch in batches.values()]
    assert shapes[0] == shapes[1]
    assert [len(batch["replay"].own) for batch in batches.values()] == [4, 4]
    many = trainers["infovla_100_tasks"]
    memory, anchors = many.memory, many.prepare_anchors()
    assert memory is not None
    assert len(memory.tasks) == 100
    assert anchors is not None
    assert len(anchors) == 1600 + 1024
    assert (np.unique(anchors.action[0].numpy(), axis=0).shape[0]) == 32  # 16 of each table, copied


def test_the_command_writes_what_it_found(
    options: argparse.Namespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "train", "--repetitions", "1", "--batch_size", "8", "--json", str(tmp_path / "b.json")]) == 0
    found = json.loads((tmp_path / "b.json").read_text())
    assert set(found["ratios"]) >= {
        "step_time_ratio_infovla_er", "peak_memory_ratio_infovla_er", "step_time_ratio_naive_infovla",
        "model_memory_ratio_naive_infovla", "step_time_ratio_100_tasks_2_tasks",
    }  # fmt: skip
    assert 1.9 < found["ratios"]["model_memory_ratio_naive_infovla"] < 2.1
    assert found["ratios"]["loss_memory_ratio_action_all_positions"] < 1
    assert "step_time_ratio_infovla_er" in capsys.readouterr().out


def test_no_gpu_is_said(options: argparse.Namespace, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    options.device = "cuda"
    with pytest.raises(ValueError, match="leave the option out"):
        make_trainer("er", Workload(2), str(tmp_path), options)

"""The cost tables: one row by hand, the formats against real files, and the tables that stand in the README."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from launcher import ROOT
from tiny_policy import tiny_policy

from infovla_peft.adapter_files import AdapterInfo
from infovla_peft.adapters import add_adapter, save_adapter
from infovla_peft.config import InfoVLAConfig
from infovla_peft.costs import (
    Shape,
    adapter_bytes,
    anchor_bytes,
    largest_batch,
    openvla_7b,
    shape_of,
    tables,
    training_bytes,
)
from infovla_peft.teacher import compute_anchors


@pytest.fixture(scope="module")
def openvla() -> Shape:
    return openvla_7b()


def without_header(file: Path) -> int:
    """Bytes of the tensors in a safetensors file: it begins with the length of its header, 8 bytes."""
    content = file.read_bytes()
    return len(content) - 8 - int.from_bytes(content[:8], "little")


def test_one_row_by_hand(openvla: Shape) -> None:
    """QLoRA on 24 GB. Counted with pencil and paper, from the shapes of Llama-2, DINOv2 and SigLIP."""
    assert openvla.parameters == pytest.approx(7.54e9, rel=1e-3)  # what the hub says of openvla/openvla-7b
    # A Llama block: 4 of 4096 x 4096, 3 of 4096 x 11008. LoRA of rank 32: 32 (in + out) for each.
    llama = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    llama_lora = 32 * 32 * (4 * 2 * 4096 + 3 * (4096 + 11008))
    assert openvla.quantised - llama == pytest.approx(0.8e9, rel=0.02)  # vision transformers 0.73, projector 0.07
    assert openvla.adapter - llama_lora == pytest.approx(28e6, rel=0.02)  # the same two
    weights = openvla.quantised * (0.5 + 1 / 64 + 1 / 4096) + 2 * (openvla.parameters - openvla.quantised)
    assert weights / 1e9 == pytest.approx(4.28, abs=0.01)
    states = 20 * openvla.adapter / 1e9  # 2.16: 16 bytes in training, 4 the adapter before
    tokens = 256 + 24 + 8
    inputs = 2 * (tokens * 4096 * 32 + 256 * 2176 * 27)  # of each block, bfloat16
    block = 50 * tokens * 4096
    by_hand = weights / 1e9 + states + 16 * (inputs + block) / 1e9 + 2.0
    assert training_bytes(openvla, "nf4", 16) / 1e9 == pytest.approx(by_hand, rel=1e-9)
    steps = 6 * openvla.parameters * tokens * 600 * 16  # forward, recomputed, backward to the inputs
    anchors = 2 * openvla.parameters * tokens * (2 * 2048 + 130)
    hours = 10 * (steps + anchors) / (0.25 * 165e12) / 3600
    assert f"| RTX 4090, 24 GB | nf4 | 16 | {by_hand:.1f} | {hours:.1f} | {10 * hours:.0f} |" in tables()


def test_what_does_not_fit_is_said(openvla: Shape) -> None:
    assert largest_batch(openvla, "bf16", 16e9) == 0
    assert 0 < largest_batch(openvla, "bf16", 20e9) < largest_batch(openvla, "bf16", 40e9)


def test_the_bytes_of_the_formats_are_those_of_the_files(tmp_path: Path) -> None:
    policy = tiny_policy()
    config = InfoVLAConfig(output_dir=str(tmp_path / "run"), use_cpu=True, lora_r=4)
    shape = shape_of(policy.model, rank=4)
    assert shape.parameters == sum(parameter.numel() for parameter in policy.model.parameters())
    model = add_adapter(policy.model, "one", config)
    info = AdapterInfo("base", {}, "libero_goal")
    folder = save_adapter(model, "one", tmp_path / "adapter", info, policy.collator.normaliser.as_statistics())
    assert without_header(folder / "adapter_model.safetensors") == adapter_bytes(shape)
    rows = np.arange(5)
    anchors = compute_anchors(model, policy.dataset, policy.collator, rows=rows)
    anchors.save(tmp_path / "anchors.safetensors")
    words = int(anchors.words.max())
    assert without_header(tmp_path / "anchors.safetensors") == anchor_bytes(shape, len(rows), words)


def test_the_readme_shows_what_is_computed() -> None:
    assert tables() in (ROOT / "recipes/README.md").read_text(encoding="utf-8")

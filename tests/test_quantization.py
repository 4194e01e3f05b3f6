"""QLoRA: a base in 4 bits, its own teacher; what is trained, saved and refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_policy import tiny_policy

from infovla_peft.adapter_files import AdapterError, AdapterInfo
from infovla_peft.adapters import add_adapter, fingerprint, load_adapter, save_adapter
from infovla_peft.config import InfoVLAConfig
from infovla_peft.hub import load_policy
from infovla_peft.memory import ReplayMemory
from infovla_peft.merging import merge
from infovla_peft.models.openvla import load_openvla
from infovla_peft.models.openvla.quantization import quantization_config, quantization_of
from infovla_peft.teacher import teacher_mode
from infovla_peft.trainer import InfoVLATrainer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("base")
    policy = tiny_policy(hidden_size=64, vision_width=64)
    policy.model.save_pretrained(folder)
    policy.processor.save_pretrained(folder)
    return folder


needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="bitsandbytes is not installed: pip install 'infovla-peft[quantization]'",
)


@needs_bitsandbytes
def test_only_the_layers_between_the_ends_are_packed(base: Path) -> None:
    model, _ = load_openvla(base, quantization="nf4")
    plain, _ = load_openvla(base)
    assert (quantization_of(model), quantization_of(plain)) == ("nf4", "none")
    packed = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.uint8}
    assert any("self_attn.q_proj" in name for name in packed)
    assert any("vision_backbone" in name for name in packed)
    assert not any(name.startswith(("action_head", "proprio_projector")) or "lm_head" in name for name in packed)
    settings = quantization_config("nf4")
    assert (settings.bnb_4bit_quant_type, settings.bnb_4bit_use_double_quant) == ("nf4", True)
    assert fingerprint(model)["weights"] != fingerprint(plain)["weights"]


@needs_bitsandbytes
def test_an_adapter_learns_on_it_and_comes_back_on_it_alone(base: Path, tmp_path: Path) -> None:
    policy = tiny_policy(hidden_size=64, vision_width=64)
    model, _ = load_openvla(base, quantization="nf4")
    config = InfoVLAConfig(
        output_dir=str(tmp_path / "run"), use_cpu=True, max_steps=2, per_device_train_batch_size=4, lora_r=4,
        learning_rate=1e-2, counterfactual_frames=4, save_strategy="no", disable_tqdm=True, report_to="none",
    )  # fmt: skip
    adapted = add_adapter(model, "one", config)
    memory = ReplayMemory().add(policy.task("open_the_drawer"))
    dataset = policy.dataset.like(policy.task("turn_on_the_stove"))
    frozen = {name: p.detach().clone() for name, p in adapted.named_parameters() if not p.requires_grad}
    batch = policy.batch([0, 1])
    with teacher_mode(adapted):
        before = adapted(**batch).predicted_actions
    trainer = InfoVLATrainer(adapted, config, dataset, policy.collator, memory=memory)
    trainer.train()
    assert all(torch.equal(p, frozen[name]) for name, p in adapted.named_parameters() if name in frozen)
    with teacher_mode(adapted):  # the same quantised base, adapters off
        assert torch.equal(adapted(**batch).predicted_actions, before)
    adapted.eval()
    with torch.no_grad():
        after = adapted(**batch).predicted_actions
    assert not torch.equal(after, before)

    statistics = policy.collator.normaliser.as_statistics()
    info = AdapterInfo(str(base), fingerprint(adapted), policy.collator.normaliser.key, quantization="nf4")
    folder = save_adapter(adapted, "one", tmp_path / "adapter", info, statistics)
    again = load_policy(folder)
    assert quantization_of(again.model.get_base_model()) == "nf4"
    with torch.no_grad():
        torch.testing.assert_close(again.model(**batch).predicted_actions, after)
    with pytest.raises(AdapterError, match=r"quantization='nf4', this one has 'none'; load it with load_openvla"):
        load_adapter(load_openvla(base)[0], folder, "one")
    assert np.isfinite(after.numpy()).all()
    with pytest.raises(AdapterError, match=r"in 4 bits \(nf4\) is too coarse.*; keep the adapter unmerged"):
        merge(adapted)


@needs_bitsandbytes
def test_an_adapter_of_the_whole_base_goes_onto_it_in_4_bits_if_asked_to(base: Path, tmp_path: Path) -> None:
    policy = tiny_policy(hidden_size=64, vision_width=64)
    model, _ = load_openvla(base)
    adapted = add_adapter(model, "one", InfoVLAConfig(output_dir=str(tmp_path / "run"), use_cpu=True, lora_r=4))
    normaliser = policy.collator.normaliser
    info = AdapterInfo(str(base), fingerprint(adapted), normaliser.key)
    folder = save_adapter(adapted, "one", tmp_path / "adapter", info, normaliser.as_statistics())
    coarse = load_policy(folder, quantization_config=quantization_config("nf4"))
    assert quantization_of(coarse.model.get_base_model()) == "nf4"
    assert quantization_of(load_policy(folder).model.get_base_model()) == "none"
    with pytest.raises(AdapterError, match=r"quantization='none', this one has 'nf4'; load it with load_openvla"):
        load_adapter(load_openvla(base, quantization="nf4")[0], folder, "one")


def test_without_bitsandbytes_the_cure_is_named(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec

    def missing(name: str, *rest: Any) -> Any:
        return None if name == "bitsandbytes" else find(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", missing)
    with pytest.raises(ImportError, match=r"pip install 'infovla-peft\[quantization\]'"):
        load_openvla(base, quantization="nf4")
    with pytest.raises(ValueError, match="none or nf4"):
        load_openvla(base, quantization="int3")  # type: ignore[arg-type]

"""`torch.compile` block by block: the same outputs, gradients and training, and an error where it cannot work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_policy import tiny_policy
from torch import Tensor

from infovla_peft.adapters import add_adapter, base_model
from infovla_peft.compilation import compiled_blocks
from infovla_peft.config import InfoVLAConfig
from infovla_peft.features import FeatureTap
from infovla_peft.memory import ReplayMemory
from infovla_peft.trainer import InfoVLATrainer

# torch looks at `.grad` of everything while it traces, and hides its own warning about it only where it is no error
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),  # importing inductor, torch's own
]


def stage(folder: Path, **options: Any) -> InfoVLATrainer:
    policy = tiny_policy()
    config = InfoVLAConfig(
        output_dir=str(folder), use_cpu=True, max_steps=3, per_device_train_batch_size=8, lora_r=4,
        save_strategy="no", logging_steps=1, disable_tqdm=True, report_to=[], tap_layer=1, **options,
    )  # fmt: skip
    memory = ReplayMemory().add(policy.task("open_the_drawer")).add(policy.task("turn_on_the_stove"))
    model = add_adapter(policy.model, "one", config)
    dataset = policy.dataset.like(policy.task("put_the_bowl_on_the_plate"))
    return InfoVLATrainer(model, config, dataset, policy.collator, memory=memory)


@pytest.mark.parametrize(
    "backend",
    ["eager", pytest.param("inductor", marks=pytest.mark.slow)],
)
def test_compiled_blocks_give_the_same_output_and_gradients(tmp_path: Path, backend: str) -> None:
    policy = tiny_policy()
    model = add_adapter(policy.model, "one", InfoVLAConfig(output_dir=str(tmp_path), use_cpu=True, lora_r=4))
    batch = policy.batch([0, 30, 60])

    def run() -> dict[str, Tensor]:
        model.zero_grad()
        with FeatureTap(base_model(model), 1) as tap:
            output = model(**batch)
        (output.loss + tap.hidden.square().mean()).backward()
        gradients = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
        return {**gradients, "loss": output.loss.detach(), "tapped": tap.hidden.detach()}

    expected = run()
    with compiled_blocks(model, tap_layer=1, backend=backend) as compiled:
        assert "language_model.model.layers.1" in compiled
        assert "language_model.model.layers.0" not in compiled  # tapped
        assert any(name.startswith("vision_backbone") for name in compiled)
        called = [module for module in model.modules() if module._compiled_call_impl is not None]
        assert len(called) == len(compiled)
        torch.testing.assert_close(run(), expected, rtol=1e-4, atol=1e-6)
    assert all(module._compiled_call_impl is None for module in model.modules())


def test_a_compiled_vision_backbone_reads_images_of_its_own_size_alone() -> None:
    vision = tiny_policy().model.vision_backbone.eval().requires_grad_(False)
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(torch.compile(vision, backend="eager", fullgraph=True)(images), vision(images))
    with pytest.raises(ValueError, match=r"shape \(batch, 3, 32, 32\)"):
        torch.compile(vision, backend="eager")(torch.rand(2, 3, 40, 40))


@pytest.mark.slow
def test_training_is_the_same(tmp_path: Path) -> None:
    curves = []
    for compile_blocks in (False, True):
        trainer = stage(tmp_path, torch_compile=compile_blocks)
        trainer.train()
        curves.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)


def test_without_a_compiler_it_is_refused_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def missing() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler: install one .* or train without torch_compile"):
        stage(tmp_path, torch_compile=True)

"""Vision features of replayed frames, kept: the same loss from fewer images, and refused where they would go stale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_policy import tiny_policy

from infovla_peft import vision_cache
from infovla_peft.adapters import add_adapter, base_model
from infovla_peft.config import InfoVLAConfig
from infovla_peft.memory import ReplayMemory
from infovla_peft.trainer import InfoVLATrainer

LANGUAGE = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"


def stage(folder: Path, *, film: bool = False, **options: Any) -> InfoVLATrainer:
    policy = tiny_policy()
    if film:
        policy.model.config.use_film = True
    config = InfoVLAConfig(
        output_dir=str(folder), use_cpu=True, max_steps=3, per_device_train_batch_size=8, lora_r=4,
        counterfactual_frames=10, save_strategy="no", logging_steps=1, disable_tqdm=True, report_to=[],
        **{"lora_targets": LANGUAGE, "image_shift": 2, **options},
    )  # fmt: skip
    memory = ReplayMemory().add(policy.task("open_the_drawer")).add(policy.task("turn_on_the_stove"))
    model = add_adapter(policy.model, "one", config)
    return InfoVLATrainer(
        model, config, policy.dataset.like(policy.task("put_the_bowl_on_the_plate")), policy.collator, memory=memory
    )


@pytest.mark.parametrize("autoregressive", [False, True])
def test_kept_features_stand_for_the_last_images(autoregressive: bool) -> None:
    policy = tiny_policy(autoregressive=autoregressive, fused=True, num_images=2)
    batch = policy.batch([0, 30, 60]) | {"pixel_values": torch.randn(3, 12, 32, 32)}
    with torch.no_grad():
        expected = policy.model(**batch)
        features = policy.model.vision_backbone(batch["pixel_values"])
        for kept in (1, 3):
            some = {**batch, "pixel_values": batch["pixel_values"][: 3 - kept], "patch_features": features[3 - kept :]}
            torch.testing.assert_close(policy.model(**some).loss, expected.loss)
        with pytest.raises(ValueError, match="As many images as prompts"):
            policy.model(**batch, patch_features=features[:1])


@pytest.mark.parametrize(
    "options",
    [{}, {"anchor_views": 2}, {"method": "er", "image_shift": 0}],
    ids=["anchors", "views", "plain replay"],
)
def test_training_is_the_same_and_sees_the_current_images_alone(tmp_path: Path, options: dict[str, Any]) -> None:
    curves, images = [], []
    for cached in (False, True):
        trainer = stage(tmp_path, cache_vision_features=cached, **options)
        seen: list[int] = []

        def count(_module: Any, inputs: tuple[torch.Tensor, ...], _output: Any, seen: list[int] = seen) -> None:
            if torch.is_grad_enabled():
                seen.append(len(inputs[0]))

        base_model(trainer.model).vision_backbone.register_forward_hook(count)  # type: ignore[arg-type]
        trainer.train()
        curves.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        images.append(seen)
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    assert images == [[8] * 3, [4] * 3]
    assert not list(tmp_path.glob(".vision*"))


def test_the_tower_runs_where_the_model_is_trained_and_nothing_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = stage(tmp_path, cache_vision_features=True)
    prepared: list[bool] = []
    compute = vision_cache._compute

    def note(*arguments: Any) -> torch.Tensor:
        prepared.append(trainer.model_wrapped is not trainer.model or trainer.optimizer is not None)
        return compute(*arguments)

    monkeypatch.setattr(vision_cache, "_compute", note)
    trainer.train()
    assert prepared == [True]
    assert trainer._vision is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_targets": "all-linear"}, "set lora_targets to layers of the language model"),
        ({"method": "mir"}, "candidates of method='mir'"),
        ({"method": "er"}, "set image_shift to 0"),
        ({"film": True}, "with FiLM"),
    ],
)
def test_what_would_change_the_features_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stage(tmp_path, cache_vision_features=True, **options)

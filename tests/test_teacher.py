"""The frozen teacher: its guard, and anchors that equal those of a freshly loaded base."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_adapters import config, randomise
from tiny_policy import TinyPolicy, tiny_policy

from infovla_peft.adapters import activate, active_adapter, add_adapter, deactivate
from infovla_peft.data.chunks import ChunkDataset
from infovla_peft.data.normalisation import Normaliser
from infovla_peft.data.sampling import Augmentation, Views
from infovla_peft.features import FeatureTap, extract_features
from infovla_peft.losses import summarize_cross_modal
from infovla_peft.memory import Anchors, ReplayMemory
from infovla_peft.models.openvla import OpenVLAForActionPrediction
from infovla_peft.teacher import anchor_spec, compute_anchors, teacher_answers, teacher_mode


def flags(model: Any) -> tuple[list[bool], list[bool], str]:
    return (
        [parameter.requires_grad for parameter in model.parameters()],
        [module.training for module in model.modules()],
        model.active_adapter,
    )


def two_adapters(policy: TinyPolicy, tmp_path: Path) -> Any:
    model = add_adapter(policy.model, "one", config(tmp_path, lora_dropout=0.5))
    randomise(model, "one")
    add_adapter(model, "two", config(tmp_path, lora_dropout=0.5))
    randomise(model, "two")
    return model.train()


@pytest.mark.parametrize("adapter", [None, "one", "two"])
def test_every_flag_is_as_before(tmp_path: Path, adapter: str | None) -> None:
    policy = tiny_policy()
    model = two_adapters(policy, tmp_path)
    next(model.modules()).training = False  # not only all True
    before = flags(model)
    with teacher_mode(model, adapter):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        first = model(**policy.batch([0])).predicted_actions
        assert torch.equal(model(**policy.batch([0])).predicted_actions, first)  # no dropout
    assert flags(model) == before
    with pytest.raises(RuntimeError, match="stop"), teacher_mode(model, adapter):
        raise RuntimeError("stop")
    assert flags(model) == before
    assert torch.is_grad_enabled()


def test_it_runs_what_it_says(tmp_path: Path) -> None:
    policy = tiny_policy()
    base = policy.model.eval()(**policy.batch([0])).predicted_actions.detach()
    model = two_adapters(policy, tmp_path)
    found = {}
    for adapter in (None, "one", "two"):
        with teacher_mode(model, adapter):
            found[adapter] = model(**policy.batch([0])).predicted_actions
    assert torch.equal(found[None], base)
    activate(model, "one")
    assert torch.equal(model.eval()(**policy.batch([0])).predicted_actions, found["one"])
    assert not torch.equal(found["one"], found["two"])


def test_it_runs_what_it_says_where_adapters_are_off(tmp_path: Path) -> None:
    policy = tiny_policy()
    model = two_adapters(policy, tmp_path)
    with teacher_mode(model, "one"):
        wanted = model(**policy.batch([0])).predicted_actions
    with teacher_mode(model):
        base = model(**policy.batch([0])).predicted_actions
        with teacher_mode(model, "one"):
            assert torch.equal(model(**policy.batch([0])).predicted_actions, wanted)
        assert torch.equal(model(**policy.batch([0])).predicted_actions, base)
    deactivate(model)
    for adapter, expected in ((None, base), ("one", wanted)):
        with teacher_mode(model, adapter):
            assert torch.equal(model(**policy.batch([0])).predicted_actions, expected)
        assert active_adapter(model) is None


def test_a_model_without_adapters_and_a_missing_adapter(tmp_path: Path) -> None:
    policy = tiny_policy()
    with teacher_mode(policy.model):
        assert not policy.model.training
    assert policy.model.training
    with pytest.raises(ValueError, match="adapter 'three' is not loaded"), teacher_mode(policy.model, "three"):
        pass


def memory_data(policy: TinyPolicy) -> ChunkDataset:
    memory = ReplayMemory().add(policy.frames)
    assert memory.frames is not None
    return policy.dataset.like(memory.frames)


def test_anchors_equal_those_of_a_freshly_loaded_base(tmp_path: Path) -> None:
    policy = tiny_policy()
    policy.model.save_pretrained(tmp_path / "base")
    model = two_adapters(policy, tmp_path)
    data = memory_data(policy)
    views = Views.draw(data, 2, Augmentation(3, 0.1), 0)
    ours = compute_anchors(model, data, policy.collator, views=views, batch_size=5)
    fresh = OpenVLAForActionPrediction.from_pretrained(tmp_path / "base")
    theirs = compute_anchors(fresh, data, policy.collator, views=views, batch_size=5)
    assert ours.spec == theirs.spec
    for name, tensor in ours.tensors().items():
        torch.testing.assert_close(tensor, theirs.tensors()[name], rtol=0, atol=1e-6)


def test_anchors_equal_features_computed_by_hand(tmp_path: Path) -> None:
    policy = tiny_policy()
    data = memory_data(policy)
    views = Views.draw(data, 2, Augmentation(3, 0.1), 0)
    anchors = compute_anchors(policy.model, data, policy.collator, views=views, batch_size=7)
    assert anchors.action.shape[:2] == (2, len(data)) == (2, 36)
    assert not views.shifts[0].any()
    policy.model.eval()
    for view, row in ((0, 0), (1, 13), (1, 35)):
        batch = policy.collator(data.__getitems__([row]))
        down, right = views.shifts[view, row]
        batch["proprio"] += torch.from_numpy(views.proprio_noise[view, row])
        pixels = torch.nn.functional.pad(batch["pixel_values"], (3, 3, 3, 3), mode="replicate")
        batch["pixel_values"] = pixels[..., 3 - down : 35 - down, 3 - right : 35 - right]
        with torch.no_grad(), FeatureTap(policy.model, -1) as tap:
            output = policy.model(**batch)
        features = extract_features(tap.hidden, output.token_roles)
        expected = summarize_cross_modal(features.vision, features.language)
        stored = anchors.summary(torch.tensor([[view, row]]), longest=features.language.shape[1])
        torch.testing.assert_close(anchors.action[view, row], features.action[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(anchors.output[view, row], output.predicted_actions[0], atol=1e-5, rtol=1e-5)
        assert torch.equal(stored.language_mask, expected.language_mask)
        torch.testing.assert_close(stored.affinity, expected.affinity, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(stored.fused, expected.fused, atol=1e-5, rtol=1e-5)


def spec(policy: TinyPolicy, model: Any, **options: Any) -> dict[str, str]:
    anchors: Anchors = compute_anchors(model, memory_data(policy), policy.collator, batch_size=36, **options)
    return dict(anchors.spec["memory"])


def test_a_specification_names_everything_that_matters(tmp_path: Path) -> None:
    policy = tiny_policy()
    model = two_adapters(policy, tmp_path)
    data = memory_data(policy)
    shifted = Views.draw(data, 2, Augmentation(3), 0)
    noisy = Views(shifted.shifts, shifted.proprio_noise + 0.1)
    specs = [
        spec(policy, model),
        spec(policy, model, adapter="one"),
        spec(policy, model, adapter="two"),
        spec(policy, model, tap_layer=1),
        spec(policy, model, pooling="prompt"),
        spec(policy, model, pooling="vision"),
        spec(policy, model, temperature=0.2),
        spec(policy, model, views=shifted),
        spec(policy, model, views=noisy),
        spec(policy, model, rows=np.arange(24)),
        spec(policy, tiny_policy(seed=1).model),
    ]
    assert len({tuple(sorted(each.items())) for each in specs}) == len(specs)
    assert spec(policy, model) == specs[0]


def test_anchors_of_some_rows_are_those_rows(tmp_path: Path) -> None:
    policy = tiny_policy()
    data = memory_data(policy)
    views = Views.draw(data, 2, Augmentation(3), 0)
    whole = compute_anchors(policy.model, data, policy.collator, views=views)
    rows = np.arange(12, 24)
    part = compute_anchors(policy.model, data, policy.collator, rows=rows, views=views.rows(rows), name="some")
    torch.testing.assert_close(part.action, whole.action[:, rows], atol=1e-6, rtol=1e-5)
    assert part.spec["some"]["rows"] == "12"


@pytest.mark.parametrize("autoregressive", [False, True])
def test_answers_are_what_the_teacher_would_do(tmp_path: Path, autoregressive: bool) -> None:
    policy = tiny_policy(autoregressive=autoregressive)
    data, rows = memory_data(policy), np.arange(5, 12)
    views = Views.draw(data, 1, Augmentation(), 0).rows(rows)
    statistics = policy.model.config.norm_stats
    found = teacher_answers(policy.model, data, policy.collator, rows=rows, views=views, batch_size=3)
    for row, answer in zip(rows, found, strict=True):
        batch = policy.collator.observations(data.__getitems__([row]))
        expected = policy.model.predict_action(**batch, unnorm_key="libero_goal")
        np.testing.assert_allclose(answer, np.atleast_2d(expected), atol=1e-5)
    assert policy.model.config.norm_stats is statistics


def test_anchors_are_fused_at_the_temperature_of_the_student() -> None:
    policy = tiny_policy()
    data = memory_data(policy)
    cold, warm = (compute_anchors(policy.model, data, policy.collator, temperature=value) for value in (0.1, 1.0))
    assert torch.equal(cold.affinity, warm.affinity)
    assert not torch.allclose(cold.fused, warm.fused, atol=1e-4)


def test_answers_are_of_the_view_and_in_the_units_of_the_collator() -> None:
    policy = tiny_policy()
    data, rows = memory_data(policy), np.arange(5, 9)
    views = Views.draw(data, 1, Augmentation(4, 0.2), 0, plain=False).rows(rows)
    wide = json.loads(json.dumps(policy.collator.normaliser.as_statistics()))
    wide["libero_goal"]["action"]["q99"] = [3.0] * 7
    policy.collator.normaliser = Normaliser(wide, "libero_goal")
    found = teacher_answers(policy.model, data, policy.collator, rows=rows, views=views)
    shown = replace(data.__getitems__(rows), shifts=views.shifts[0], proprio_noise=views.proprio_noise[0])
    with torch.no_grad():
        seen = policy.model.eval()(**policy.collator(shown)).predicted_actions.numpy()
    np.testing.assert_allclose(found, policy.collator.normaliser.unnormalise_actions(seen), atol=1e-5)


def test_anchors_are_of_the_states_they_were_made_of() -> None:
    policy = tiny_policy()
    data, rows = memory_data(policy), np.arange(9)
    views = Views.draw(data, 1, Augmentation(), 0).rows(rows)
    options: dict[str, Any] = {"adapter": None, "tap_layer": -1, "temperature": 0.1, "dtype": "no"}
    before = anchor_spec(policy.model, data, policy.collator, rows, views, **options)
    data.states[3] += 0.1
    assert anchor_spec(policy.model, data, policy.collator, rows, views, **options) != before

"""Several adapters on one base: switching, mixed batches; adapters of other origin; merging."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft.tuners.lora import LoraLayer
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_run import TASKS, act, build_run

from infovla_peft import load_policy
from infovla_peft.adapter_files import AdapterError, AdapterInfo, read_info, write_info
from infovla_peft.adapters import (
    active_adapter,
    adapter_parameters,
    add_adapter,
    base_model,
    fingerprint,
    read_adapter,
)
from infovla_peft.config import InfoVLAConfig
from infovla_peft.foreign import fingerprint_of_files, load_reference_adapter
from infovla_peft.library import StoredAdapter, choose, find_adapters
from infovla_peft.merging import merge, save_merged, unmerge
from infovla_peft.models.openvla import load_openvla

KNOWN = ["open the drawer", "turn on the stove", "close the door"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_run(tmp_path_factory.mktemp("sharing") / "run")


def observations(count: int) -> tuple[list[Any], list[Any]]:
    random = np.random.default_rng(1)
    images = [random.integers(0, 256, (24, 24, 3), dtype=np.uint8) for _ in range(count)]
    return images, [random.uniform(-1, 1, 8) for _ in range(count)]


# --- several adapters on one base ---


def test_use_switches_between_adapters_that_stay_as_they_are(run: Path) -> None:
    expected = {task: act(load_policy(run, task=task), None) for task in KNOWN}
    policy = load_policy(run)
    assert policy.tasks == TASKS
    before = fingerprint(policy.model)
    for task in [*KNOWN, *reversed(KNOWN), TASKS[1]]:
        assert policy.use(task) is policy
        name = KNOWN[TASKS.index(task)] if task in TASKS else task
        assert policy.instruction == name
        assert act(policy, None) == expected[name]
        assert not any(parameter.requires_grad for parameter in policy.model.parameters())
    assert sorted(policy.model.peft_config) == ["stage_01", "stage_02"]  # each was read once
    assert fingerprint(policy.model) == before
    assert act(policy.use(stage=0)) == expected["open the drawer"]
    assert act(policy.use(stage=2)) == act(load_policy(run, stage=2))
    with pytest.raises(ValueError, match="has learned no task 'juggle'"):
        policy.use("juggle")
    with pytest.raises(ValueError, match="say which"):
        policy.use()
    with pytest.raises(ValueError, match="loaded without adapters"):
        load_policy(run / "base").use("turn on the stove")


def test_several_tasks_are_read_at_once(run: Path) -> None:
    policy = load_policy(run, task=["turn on the stove", "close the door"])
    assert sorted(policy.model.peft_config) == ["stage_01", "stage_02"]
    assert active_adapter(policy.model) == "stage_01"
    assert policy.instruction == "turn on the stove"
    with pytest.raises(ValueError, match="names no task"):
        load_policy(run, task=[])


def test_one_forward_serves_a_batch_of_several_tasks(run: Path) -> None:
    images, states = observations(5)
    tasks = [KNOWN[1], KNOWN[0], KNOWN[2], KNOWN[1], KNOWN[0]]
    policy = load_policy(run, task=KNOWN[2])
    calls: list[int] = []
    base_model(policy.model).language_model.register_forward_hook(lambda *_: calls.append(1))
    base_model(policy.model).language_model.model.register_forward_hook(lambda *_: calls.append(1))
    mixed = policy.act(images, proprio=states, task=tasks)
    assert mixed.shape == (5, 2, 7)
    assert len(calls) == 1
    assert active_adapter(policy.model) == "stage_02"  # what was in use is in use again
    for row, task in enumerate(tasks):
        alone = policy.act(images[row], proprio=states[row], task=task)
        np.testing.assert_allclose(mixed[row], alone, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(
            mixed[row], policy.use(task).act(images[row], proprio=states[row]), rtol=1e-5, atol=1e-5
        )
    assert np.abs(mixed[0] - policy.use(KNOWN[2]).act(images[0], KNOWN[1], states[0])).max() > 1e-3
    policy.use(stage=0)  # adapters off: they serve a mixed batch all the same, and are off again afterwards
    assert np.array_equal(policy.act(images, proprio=states, task=tasks), mixed)
    assert active_adapter(policy.model) is None
    told = [KNOWN[1]] * 5
    assert np.array_equal(
        policy.act(images, KNOWN[1], states, task=tasks), policy.act_batch(images, told, states, tasks=tasks)
    )
    with pytest.raises(ValueError, match="one task per observation, got 5 observations"):
        policy.act(images, proprio=states, task=tasks[:3])
    for instruction, message in ((told, "must be one text, got .*; act_batch takes several"), ("", "says what to do")):
        with pytest.raises(ValueError, match=message):
            policy.act(images, instruction, states, task=tasks)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="says what to do, got ''"):
        policy.act(images[0], "", states[0], task=tasks[0])
    with pytest.raises(ValueError, match="images must be given in a sequence, one each, got None"):
        policy.act(None, proprio=states, task=tasks)
    with pytest.raises(ValueError, match="tasks must be given in a sequence, one each, got 'ab'"):
        policy.act_batch(images[:2], None, states[:2], tasks="ab")


@pytest.mark.parametrize("stage", [0, 1])
def test_a_batch_that_fails_changes_nothing(run: Path, tmp_path: Path, stage: int) -> None:
    """An unknown task behind a known one, or weights that do not fit."""
    images, states = observations(2)
    run = shutil.copytree(run, tmp_path / "run")
    policy = load_policy(run, stage=stage)
    before = policy.act(images[0], KNOWN[1], states[0])
    running = active_adapter(policy.model)
    with pytest.raises(ValueError, match="has learned no task 'fly to the moon'"):
        policy.act(images, proprio=states, task=[KNOWN[2], "fly to the moon"])
    folder = find_adapters(run)[1].folder
    weights = load_file(folder / "adapter_model.safetensors")
    name = next(iter(weights))
    save_file({**weights, name: weights[name][:, 1:].contiguous()}, folder / "adapter_model.safetensors")
    write_info(folder, read_info(folder))
    for _ in range(2):  # the second time is no better than the first
        with pytest.raises(AdapterError, match="do not fit the model"):
            policy.act(images, proprio=states, task=[KNOWN[1], KNOWN[2]])
    assert (active_adapter(policy.model) or None) == ("stage_01" if stage else None)
    assert running == ("stage_01" if stage else None)
    assert np.array_equal(policy.act(images[0], KNOWN[1], states[0]), before)
    assert "stage_02" not in getattr(policy.model, "peft_config", {})


@pytest.mark.parametrize("adapted", [False, True])
def test_a_refused_adapter_leaves_what_is_trained(run: Path, tmp_path: Path, adapted: bool) -> None:
    folder = shutil.copytree(find_adapters(run)[1].folder, tmp_path / "other")
    weights = load_file(folder / "adapter_model.safetensors")
    name = next(iter(weights))
    save_file({**weights, name: weights[name][:, 1:].contiguous()}, folder / "adapter_model.safetensors")
    model: Any = load_openvla(run / "base")[0]
    if adapted:
        model = add_adapter(model, "mine", InfoVLAConfig(output_dir=str(tmp_path), use_cpu=True, lora_r=2))
    names = [key for key, parameter in model.named_parameters() if parameter.requires_grad]
    assert names
    with pytest.raises(AdapterError, match="do not fit the model"):
        read_adapter(model, folder, "other")
    assert [key for key, parameter in model.named_parameters() if parameter.requires_grad] == names
    assert active_adapter(model) == ("mine" if adapted else None)


def test_adapters_with_other_statistics_do_not_share_a_policy(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    folder = find_adapters(copy)[0].folder
    info = read_info(folder)
    write_info(folder, type(info)(**{**vars(info), "prompt": "Q: {instruction}\nA:"}))
    policy = load_policy(copy)
    with pytest.raises(AdapterError, match="another prompt than the adapters in use"):
        policy.use(TASKS[1])
    write_info(folder, type(info)(**{**vars(info), "image_pipeline": {"center_crop": True}}))
    write_info(
        find_adapters(copy)[1].folder,
        type(info)(**{**vars(read_info(find_adapters(copy)[1].folder)), "image_pipeline": {"center_crop": False}}),
    )
    with pytest.raises(AdapterError, match="another image pipeline than"):
        load_policy(copy).use(TASKS[1])
    again = Path(shutil.copytree(run, tmp_path / "again"))
    first = find_adapters(again)[0].folder
    content = json.loads((first / "dataset_statistics.json").read_text())
    content["libero_10"]["action"]["q99"] = [3.0] * 7
    (first / "dataset_statistics.json").write_text(json.dumps(content))
    write_info(first, read_info(first))
    with pytest.raises(AdapterError, match="another statistics than"):
        load_policy(again).use(stage=1)
    write_info(folder, type(info)(**{**vars(info), "prompt": "Q: {instruction}\nA:"}))
    other = load_policy(copy, stage=1)
    assert other.prompt == "Q: {instruction}\nA:"
    assert act(other) != act(load_policy(run, stage=1))  # it reads the adapter's own prompt


# --- of other origin ---


def test_the_fingerprint_of_the_files_is_that_of_the_model(run: Path) -> None:
    model, _ = load_openvla(run / "base")
    assert fingerprint_of_files(run / "base", model, {}) == fingerprint(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_modules": "([a-z_]+)+!"}, "not a pattern"),  # PEFT would search for it for ever
        ({"init_lora_weights": "pissa"}, "which changes the base"),
        ({"base_model_name_or_path": "./base"}, "infovla.json is missing"),
    ],
)
def test_a_plain_adapter_is_lora_on_layers_that_it_names(
    run: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    plain = tmp_path / "plain"
    shutil.copytree(find_adapters(run)[0].folder, plain)
    (plain / "infovla.json").unlink()
    content = json.loads((plain / "adapter_config.json").read_text())
    (plain / "adapter_config.json").write_text(json.dumps({**content, "base_model_name_or_path": "a/b", **change}))
    model, _ = load_openvla(run / "base")
    with pytest.raises(AdapterError, match=message):
        load_reference_adapter(model, plain, "plain")


@pytest.mark.shared
def test_an_adapter_of_the_original_recipe_acts_as_recorded(shared: Path) -> None:
    golden = shared / "golden"
    folder = golden / "tiny-openvla-fused" / "lora_adapter"
    policy = load_policy(folder, base=golden / "tiny-openvla-fused", unnorm_key="toy_libero")
    reference, recorded = load_file(golden / "golden_fused.safetensors"), load_file(golden / "golden_lora.safetensors")
    names = ("input_ids", "attention_mask", "pixel_values", "labels")
    mask = reference["train/multimodal_attention_mask"].bool()
    with torch.no_grad():
        output = policy.model(**{name: reference[f"train/{name}"] for name in names})
    expected = recorded["lora/logits_action_ids"][mask]
    difference = (output.logits[..., 31744:32000][mask] - expected).abs().max() / expected.abs().max()
    assert difference < 1e-5
    head = base_model(policy.model).language_model.lm_head.base_layer.weight
    stored = load_openvla(golden / "tiny-openvla-fused")[0].language_model.lm_head.weight
    assert torch.equal(head, stored)  # its file's copy of lm_head was left out
    image = np.asarray(Image.open(golden / "image0.png").convert("RGB"))
    assert policy.act(image, "open the drawer").shape == (1, 7)
    with pytest.raises(FileNotFoundError, match="give load_policy the base as `base`"):
        load_policy(folder)


def test_stage_0_of_a_plain_adapter_is_the_base(run: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    shutil.copytree(find_adapters(run)[0].folder, plain)
    (plain / "infovla.json").unlink()
    content = json.loads((plain / "adapter_config.json").read_text())
    (plain / "adapter_config.json").write_text(json.dumps({**content, "base_model_name_or_path": "a/b"}))
    expected = act(load_policy(run / "base"), "open the drawer")
    policy = load_policy(plain, base=run / "base")
    adapted = act(policy, "open the drawer")
    assert adapted != expected
    assert act(policy.use(stage=0), "open the drawer") == expected
    assert act(policy.use(stage=1), "open the drawer") == adapted
    for task in (None, "open the drawer"):
        assert act(load_policy(plain, base=run / "base", stage=0, task=task), "open the drawer") == expected
    with pytest.raises(ValueError, match="no adapter of stage 2; it has: stage 1, a plain PEFT adapter"):
        policy.use(stage=2)


def test_stage_0_is_the_base_of_an_adapter_that_names_no_stage_too() -> None:
    info = AdapterInfo(base_model="base", base_fingerprint={}, unnorm_key="a", task="open_the_drawer")
    adapters, folder = [StoredAdapter(Path("a"), info)], Path("a")
    assert choose(adapters, folder, "a", None, None)[0] is adapters[0]
    assert choose(adapters, folder, "a", None, 0)[0] is None


def test_a_plain_adapter_that_is_no_lora_of_the_recipe_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "adapter_config.json"
    for content, message in [
        ('{"peft_type": "IA3"}', "peft_type is 'IA3'"),
        ('{"peft_type": "LORA", "megatron_config": {}}', "megatron_config"),
        ("{", "is no valid JSON"),
    ]:
        config.write_text(content)
        with pytest.raises(AdapterError, match=message):
            load_policy(tmp_path)


# --- merging ---


def test_merging_changes_nothing_and_can_be_taken_back(run: Path) -> None:
    policy = load_policy(run, stage=1)
    before = np.array(act(policy))
    weights = {name: value.clone() for name, value in policy.model.state_dict().items()}
    assert 0 < merge(policy.model) < 1e-5
    np.testing.assert_allclose(act(policy), before, atol=1e-4)
    assert any(not torch.equal(value, weights[name]) for name, value in policy.model.state_dict().items())
    with pytest.raises(AdapterError, match="merged already"):
        merge(policy.model)
    assert unmerge(policy.model) < 1e-5
    np.testing.assert_allclose(act(policy), before, atol=1e-4)
    with pytest.raises(AdapterError, match="no adapter is merged"):
        unmerge(policy.model)
    with pytest.raises(AdapterError, match="nothing to merge"):
        merge(policy.use(stage=0).model)


def test_an_adapter_with_dropout_is_merged_in_training_mode_too(run: Path) -> None:
    policy = load_policy(run, stage=1)
    before = np.array(act(policy))
    dropouts = [module.lora_dropout for module in policy.model.modules() if isinstance(module, LoraLayer)]
    for dropout in dropouts:
        dropout["stage_01"] = torch.nn.Dropout(0.5)
    policy.model.train()
    policy.model.base_model.model.language_model.eval()
    flags = [module.training for module in policy.model.modules()]
    assert merge(policy.model) < 1e-5
    assert [module.training for module in policy.model.modules()] == flags
    assert unmerge(policy.model) < 1e-5
    assert [module.training for module in policy.model.modules()] == flags
    policy.model.eval()
    np.testing.assert_allclose(act(policy), before, atol=1e-4)


@pytest.mark.parametrize("assigned", [True, False])
@pytest.mark.parametrize("dtype", [None, "float16"])
def test_no_adapter_goes_onto_a_base_that_has_another_in_its_weights(
    run: Path, assigned: bool, dtype: str | None
) -> None:
    images, states = observations(2)
    policy = load_policy(run, task=KNOWN[1], dtype=dtype)
    expected = policy.act(images[0], proprio=states[0])
    merged = policy.model.merge_and_unload()
    if assigned:
        policy.model = merged
    for use in (
        lambda: policy.use(KNOWN[2]),
        lambda: policy.use(KNOWN[1]),
        lambda: policy.use(stage=0),
        lambda: policy.act(images, proprio=states, task=[KNOWN[1], KNOWN[2]]),
        lambda: policy.act(images[0], proprio=states[0], task=KNOWN[0]),
    ):
        with pytest.raises(AdapterError, match=r"one was merged into its weights.*load the policy again"):
            use()
    np.testing.assert_allclose(policy.act(images[0], proprio=states[0]), expected, atol=1e-4 if dtype is None else 0.1)


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_an_unloaded_base_takes_adapters_again(run: Path, dtype: str | None) -> None:
    expected = {task: act(load_policy(run, task=task, dtype=dtype), None) for task in KNOWN}
    for task in KNOWN:
        policy = load_policy(run, task=KNOWN[1], dtype=dtype)
        policy.model = policy.model.unload()
        assert act(policy.use(task), None) == expected[task]


def test_a_merge_that_goes_wrong_is_named_and_undone(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load_policy(run, stage=1)
    before = np.array(act(policy))
    layer = next(module for module in policy.model.modules() if hasattr(module, "get_delta_weight"))
    right = type(layer).get_delta_weight
    monkeypatch.setattr(type(layer), "get_delta_weight", lambda self, adapter: 2 * right(self, adapter))
    with pytest.raises(AdapterError, match=r"merging changes the output of .*, allowed 1e-04"):
        merge(policy.model)
    np.testing.assert_allclose(act(policy), before, atol=1e-4)


def test_a_merged_checkpoint_needs_no_adapter(run: Path, tmp_path: Path) -> None:
    policy = load_policy(run, stage=1)
    expected = np.array(act(policy))
    assert len(list(adapter_parameters(policy.model, "stage_01"))) > 0
    folder = save_merged(policy.model, policy.processor, tmp_path / "merged")
    assert not list(folder.glob("adapter*"))
    merged = load_policy(folder)
    np.testing.assert_allclose(act(merged), expected, atol=1e-4)
    assert "lora" not in json.dumps(list(merged.model.state_dict()))
    assert np.abs(np.array(act(load_policy(run, stage=0))) - expected).max() > 1e-2


def test_a_merged_checkpoint_replaces_nothing(run: Path) -> None:
    policy = load_policy(run)
    before = fingerprint(load_openvla(run / "base")[0])
    with pytest.raises(FileExistsError, match="base is not empty; name a new folder"):
        save_merged(policy.model, policy.processor, run / "base")
    assert active_adapter(policy.model) == "stage_02"  # and nothing is merged
    assert fingerprint(load_openvla(run / "base")[0]) == fingerprint(policy.model) == before


def test_a_merged_checkpoint_acts_with_the_adapter_s_prompt_crop_and_cameras(run: Path, tmp_path: Path) -> None:
    folder = find_adapters(Path(shutil.copytree(run, tmp_path / "run")))[0].folder
    told = replace(
        read_info(folder),
        prompt="Out: {instruction}? In:",
        image_pipeline={"center_crop": True},
        cameras=["robot0_eye_in_hand"],
    )
    write_info(folder, told)
    policy = load_policy(folder)
    expected = np.array(act(policy))
    merged = load_policy(save_merged(policy.model, policy.processor, tmp_path / "merged"))
    assert (merged.prompt, merged.crop, merged.cameras) == (told.prompt, True, ("robot0_eye_in_hand",))
    np.testing.assert_allclose(act(merged), expected, atol=1e-4)
    merged.crop = False
    assert np.abs(np.array(act(merged)) - expected).max() > 1e-3  # what would come of it without
    edit = json.loads((tmp_path / "merged" / "config.json").read_text())
    (tmp_path / "merged" / "config.json").write_text(json.dumps({**edit, "acting": [1]}))
    with pytest.raises(ValueError, match="`acting` must hold prompt"):
        load_policy(tmp_path / "merged")

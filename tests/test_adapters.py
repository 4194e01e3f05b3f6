"""One adapter per task: targets, freezing, storage, and the check against the base."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tiny_policy import TinyPolicy, tiny_policy
from torch import nn

from infovla_peft.adapter_files import AdapterError, AdapterInfo, read_info, read_lora, read_statistics, write_info
from infovla_peft.adapters import (
    activate,
    active_adapter,
    adapter_parameters,
    adapter_weights,
    add_adapter,
    base_model,
    check_base,
    fingerprint,
    freeze_unused,
    load_adapter,
    merge_adapters,
    read_adapter_weights,
    save_adapter,
    target_modules,
)
from infovla_peft.config import InfoVLAConfig
from infovla_peft.integrity import write_sealed
from infovla_peft.models.openvla import OpenVLAForActionPrediction


def config(tmp_path: Path, **options: Any) -> InfoVLAConfig:
    return InfoVLAConfig(**{"output_dir": str(tmp_path), "lora_r": 4, "lora_alpha": 8, "use_cpu": True, **options})


def info(policy: TinyPolicy) -> AdapterInfo:
    return AdapterInfo(
        base_model="../base", base_fingerprint=fingerprint(policy.model), unnorm_key="libero_goal", task="a", stage=1
    )


def randomise(model: nn.Module, name: str) -> None:
    """As after training: B is no longer zero."""
    for _, parameter in adapter_parameters(model, name):
        with torch.no_grad():
            parameter.normal_(0, 0.2)


def predictions(policy: TinyPolicy, model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**policy.batch([0, 30])).predicted_actions


def test_every_target_gets_a_gradient_and_every_linear_layer_with_a_gradient_is_a_target(tmp_path: Path) -> None:
    for fused in (False, True):
        policy = tiny_policy(fused=fused)
        policy.model(**policy.batch([0, 30])).loss.backward()
        linear = {name: module for name, module in policy.model.named_modules() if isinstance(module, nn.Linear)}
        with_gradient = {name for name, module in linear.items() if module.weight.grad is not None}
        targets = target_modules(policy.model, "all-linear")
        assert set(targets) == with_gradient
        assert {"action_head.model.fc1", "proprio_projector.fc2", "projector.fc1"} <= set(targets)
        model = add_adapter(policy.model, "stage_01", config(tmp_path))
        model(**policy.batch([0, 30])).loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_all_that_is_trained_in_the_base_stage_gets_a_gradient() -> None:
    policy = tiny_policy(fused=True)
    freeze_unused(policy.model)
    policy.model(**policy.batch([0, 30])).loss.backward()
    for name, parameter in policy.model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_targets_by_name(tmp_path: Path) -> None:
    policy = tiny_policy()
    names = target_modules(policy.model, "q_proj, action_head.model.fc1")
    assert len(names) == 3
    with pytest.raises(AdapterError, match="no linear layer is named 'w_proj'; choose among"):
        target_modules(policy.model, "w_proj")
    for nothing in ("lm_head", "", " , "):  # the first never runs with the L1 head
        with pytest.raises(AdapterError, match="names no layer that runs"):
            target_modules(policy.model, nothing)
    policy.model.config.action_head = "discrete"
    assert target_modules(policy.model, "lm_head") == ["language_model.lm_head"]
    assert not any("lm_head" in name for name in target_modules(policy.model, "all-linear"))


def test_a_new_adapter_changes_nothing_and_only_it_is_trainable(tmp_path: Path) -> None:
    policy = tiny_policy()
    before = predictions(policy, policy.model)
    model = add_adapter(policy.model, "stage_01", config(tmp_path))
    assert torch.equal(predictions(policy, model), before)
    randomise(model, "stage_01")
    add_adapter(model, "stage_02", config(tmp_path))
    assert torch.equal(predictions(policy, model), before)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, _ in adapter_parameters(model, "stage_02")}
    assert target_modules(model, "all-linear") == target_modules(tiny_policy().model, "all-linear")


def test_continuing_copies_the_weights(tmp_path: Path) -> None:
    policy = tiny_policy()
    model = add_adapter(policy.model, "one", config(tmp_path))
    randomise(model, "one")
    after_one = predictions(policy, model)
    add_adapter(model, "two", config(tmp_path), start_from="one")
    assert torch.equal(predictions(policy, model), after_one)
    randomise(model, "two")
    activate(model, "one")
    assert torch.equal(predictions(policy, model), after_one)  # copied, not shared
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_initial_weights_depend_on_seed_and_name_alone(tmp_path: Path) -> None:
    def weights(name: str, seed: int) -> torch.Tensor:
        torch.manual_seed(torch.seed() % 1000)
        before = torch.get_rng_state()
        model = add_adapter(tiny_policy().model, name, config(tmp_path, seed=seed))
        assert torch.equal(torch.get_rng_state(), before)
        return torch.cat([parameter.flatten() for _, parameter in adapter_parameters(model, name)])

    assert torch.equal(weights("one", 0), weights("one", 0))
    assert not torch.equal(weights("one", 0), weights("one", 1))
    assert not torch.equal(weights("one", 0), weights("two", 0))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("one", {}, "must be new, without dots"),
        ("lora", {}, "must be new, without dots"),
        ("a.b", {}, "must be new, without dots"),
        ("0", {}, "must be new, without dots"),  # `layers.0.` would be taken for it
        ("q_proj", {}, "must be new, without dots"),
        ("lora_A", {}, "must be new, without dots"),
        ("base_layer", {}, "must be new, without dots"),
        ("two", {"start_from": "zero"}, "cannot start from adapter 'zero'"),
    ],
)
def test_unusable_names(tmp_path: Path, name: str, options: dict[str, str], message: str) -> None:
    model = add_adapter(tiny_policy().model, "one", config(tmp_path))
    with pytest.raises(AdapterError, match=message):
        add_adapter(model, name, config(tmp_path), **options)
    if not options and name != "one":
        with pytest.raises(AdapterError, match=message):
            merge_adapters(model, ["one"], into=name)
        with pytest.raises(AdapterError, match=message):
            add_adapter(tiny_policy().model, name, config(tmp_path))


def test_an_adapter_replaces_nothing_but_an_adapter(tmp_path: Path) -> None:
    policy = tiny_policy()
    model = add_adapter(policy.model, "one", config(tmp_path))
    folder = tmp_path / "run"

    def save() -> None:
        save_adapter(model, "one", folder, info(policy), {})

    save()
    save()  # the same again
    (folder / "notes.md").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds what an adapter does not \(notes.md\), and would lose it"):
        save()
    assert (folder / "notes.md").read_text() == "mine"


def test_continuing_with_another_rank(tmp_path: Path) -> None:
    model = add_adapter(tiny_policy().model, "one", config(tmp_path))
    with pytest.raises(AdapterError, match="keep lora_r and lora_targets, or use adapter_init='fresh'"):
        add_adapter(model, "two", config(tmp_path, lora_r=2), start_from="one")


def test_continuing_at_another_scale_is_refused(tmp_path: Path) -> None:
    """The matrices alone would be copied: at twice the scale they are twice the update."""
    model = add_adapter(tiny_policy().model, "one", config(tmp_path))
    alpha = config(tmp_path).lora_alpha
    with pytest.raises(AdapterError, match=f"has lora_alpha {alpha}, the new one {2 * alpha}: .* keep lora_alpha"):
        add_adapter(model, "two", config(tmp_path, lora_alpha=2 * alpha), start_from="one")
    assert list(model.peft_config) == ["one"]


def test_a_refused_start_can_be_corrected(tmp_path: Path) -> None:
    model = add_adapter(tiny_policy().model, "one", config(tmp_path))
    with pytest.raises(AdapterError, match="another shape"):
        add_adapter(model, "two", config(tmp_path, lora_targets="q_proj"), start_from="one")
    assert list(model.peft_config) == ["one"]
    assert active_adapter(model) == "one"
    add_adapter(model, "two", config(tmp_path), start_from="one")
    assert active_adapter(model) == "two"


# --- on disk ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_adapter_on_a_base_of_16_bits_is_read_as_it_was_saved(tmp_path: Path, dtype: torch.dtype) -> None:
    """What continues from it, teaches or is merged must not be rounded to the type of the base."""
    policy = tiny_policy()
    model = add_adapter(policy.model.to(dtype), "one", config(tmp_path))
    randomise(model, "one")
    folder = save_adapter(model, "one", tmp_path / "adapter", info(policy), {"libero_goal": {"action": {}}})
    saved = load_file(folder / "adapter_model.safetensors")
    loaded, _ = load_adapter(tiny_policy().model.to(dtype), folder, "again", trainable=True)
    assert {parameter.dtype for _, parameter in adapter_parameters(loaded, "again")} == {torch.float32}
    assert all(parameter.requires_grad for _, parameter in adapter_parameters(loaded, "again"))
    add_adapter(loaded, "next", config(tmp_path), start_from="again")
    for name in ("again", "next"):
        found = adapter_weights(loaded, name)
        assert set(found) == set(saved)
        assert all(torch.equal(found[key], tensor) for key, tensor in saved.items())


def test_an_adapter_reads_back_bit_for_bit(tmp_path: Path) -> None:
    policy = tiny_policy()
    stored = info(policy)
    model = add_adapter(policy.model, "one", config(tmp_path))
    randomise(model, "one")
    expected = predictions(policy, model)
    folder = save_adapter(model, "one", tmp_path / "adapter", stored, {"libero_goal": {"action": {}}})
    assert sorted(file.name for file in folder.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "dataset_statistics.json", "infovla.json"
    ]  # fmt: skip
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "../base"
    fresh = tiny_policy()
    loaded, read = load_adapter(fresh.model, folder, "any_name")
    assert replace(read, sha256={}) == stored
    assert torch.equal(predictions(fresh, loaded), expected)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    again = fingerprint(model, "one")
    assert {**again, "weights": ""} == {**fingerprint(loaded, "any_name"), "weights": ""}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's own
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern is .* must be left empty"),
        ({"target_modules": r".*q_proj"}, "target_modules is .* not a pattern"),
        ({"bias": "lora_only"}, "bias is 'lora_only', which must be left empty"),
        ({"modules_to_save": ["projector"]}, "modules_to_save is .* must be left empty"),
        (
            {"target_modules": ["embed_tokens", "q_proj"]},
            r"2 parameters would be lost \(.*lora_embedding_A",
        ),
        (None, "peft_type is IA3"),
    ],
    ids=str,
)
def test_what_could_not_be_read_again_is_not_written(
    tmp_path: Path, options: dict[str, Any] | None, message: str
) -> None:
    from peft import IA3Config, LoraConfig, get_peft_model

    policy = tiny_policy()
    base: Any = {"target_modules": ["q_proj"]}
    shape = IA3Config(**base, feedforward_modules=[]) if options is None else LoraConfig(**{**base, "r": 4, **options})
    model: Any = get_peft_model(policy.model, shape)
    with pytest.raises(AdapterError, match=message):
        save_adapter(model, "default", tmp_path / "adapter", info(policy), {})
    assert not (tmp_path / "adapter").exists()


def test_what_was_trained_beside_an_adapter_is_not_left_out_in_silence(tmp_path: Path) -> None:
    policy = tiny_policy()
    model = add_adapter(policy.model, "one", config(tmp_path))
    add_adapter(model, "two", config(tmp_path))
    save_adapter(model, "one", tmp_path / "one", info(policy), {})  # that another is in training does not matter
    base_model(model).projector.fc1.weight.requires_grad_(True)
    with pytest.raises(AdapterError, match=r"parameters would be lost \(.*projector.*activate\(model, 'two'"):
        save_adapter(model, "two", tmp_path / "two", info(policy), {})


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's own
@pytest.mark.filterwarnings("ignore:`lora_bias=True`")  # of layers without a bias
@pytest.mark.filterwarnings("ignore:Adapter 'one'.* have invalid shape")  # of the bias, which has one dimension
@pytest.mark.parametrize("options", [{"use_dora": True}, {"use_rslora": True}, {"lora_bias": True}], ids=str)
def test_other_kinds_of_lora_read_back_bit_for_bit(tmp_path: Path, options: dict[str, Any]) -> None:
    from peft import LoraConfig, get_peft_model

    policy = tiny_policy()
    model: Any = get_peft_model(policy.model, LoraConfig(r=4, target_modules=["fc1"], **options))
    randomise(model, "default")
    expected = predictions(policy, model)
    folder = save_adapter(model, "default", tmp_path / "adapter", info(policy), {})
    fresh = tiny_policy()
    assert torch.equal(predictions(fresh, load_adapter(fresh.model, folder, "one")[0]), expected)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's own
def test_peft_itself_reads_the_folder(tmp_path: Path) -> None:
    from peft import PeftModel

    policy = tiny_policy()
    model = add_adapter(policy.model, "one", config(tmp_path))
    randomise(model, "one")
    expected = predictions(policy, model)
    folder = save_adapter(model, "one", tmp_path / "adapter", info(policy), {})
    fresh = tiny_policy()
    assert torch.equal(predictions(fresh, PeftModel.from_pretrained(fresh.model, str(folder))), expected)


def test_weights_of_a_base_in_an_adapter_file_are_not_read(tmp_path: Path) -> None:
    policy = tiny_policy()
    model = add_adapter(policy.model, "one", config(tmp_path))
    folder = save_adapter(model, "one", tmp_path / "adapter", info(policy), {})
    weights = load_file(folder / "adapter_model.safetensors")
    assert not any("base_layer" in key for key in weights)
    head = base_model(model).language_model.lm_head.weight
    weights["base_model.model.language_model.lm_head.base_layer.weight"] = torch.zeros_like(head)
    save_file(weights, folder / "adapter_model.safetensors")
    write_info(folder, read_info(folder))
    loaded, _ = load_adapter(tiny_policy().model, folder, "one")
    assert torch.equal(base_model(loaded).language_model.lm_head.weight, head)


def test_damaged_and_foreign_folders(tmp_path: Path) -> None:
    policy = tiny_policy()
    model = add_adapter(policy.model, "one", config(tmp_path))
    folder = save_adapter(model, "one", tmp_path / "adapter", info(policy), {})
    with pytest.raises(FileNotFoundError, match=r"infovla.json is missing"):
        read_info(tmp_path)
    weights = folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-8])
    with pytest.raises(AdapterError, match="is damaged"):
        load_adapter(tiny_policy().model, folder, "one")
    lora = load_file(save_adapter(model, "one", tmp_path / "b", info(policy), {}) / "adapter_model.safetensors")
    lora.pop(next(iter(lora)))
    save_file(lora, weights)
    write_info(folder, read_info(folder))
    with pytest.raises(AdapterError, match="1 missing"):
        load_adapter(tiny_policy().model, folder, "one")
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model.safetensors is missing"):
        load_adapter(tiny_policy().model, folder, "one")
    (folder / "infovla.json").write_text('{"format_version": 99}')
    with pytest.raises(AdapterError, match="update the package"):
        read_info(folder)
    (folder / "infovla.json").write_text("{")
    with pytest.raises(AdapterError, match="is damaged"):
        read_info(folder)


def test_weights_of_another_shape_or_type_are_refused(tmp_path: Path) -> None:
    policy = tiny_policy()
    model = add_adapter(policy.model, "one", config(tmp_path))
    folder = save_adapter(model, "one", tmp_path / "adapter", info(policy), {})
    file = folder / "adapter_model.safetensors"
    lora = load_file(file)
    key = next(key for key in lora if "lora_A" in key)
    for wrong in (lora[key].T.contiguous(), lora[key].to(torch.int32)):
        save_file({**lora, key: wrong}, file)
        with pytest.raises(
            AdapterError, match=r"do not fit the model: .*lora_A.*not floats of.*copy it again"
        ) as error:
            read_adapter_weights(model, "one", folder)
        assert str(file) in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_modules": "(a+)+$"}, "target_modules is '[(]a[+][)][+][$]'; it must be a list of layers' names"),
        ({"target_modules": ["(a+)+$"]}, "must be a list of layers' names"),
        ({"target_modules": None}, "must be a list of layers' names"),
        ({"exclude_modules": "(a+)+$"}, "exclude_modules is"),
        ({"layers_to_transform": [0], "layers_pattern": "(a+)+$"}, "layers_to_transform is|layers_pattern is"),
        ({"rank_pattern": {"(a+)+$": 1}}, "rank_pattern is"),
        ({"alpha_pattern": {"(a+)+$": 1}}, "alpha_pattern is"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"megatron_config": {"a": 1}, "megatron_core": "os"}, "megatron_config is"),
        ({"layer_replication": [[0, 1]]}, "layer_replication is"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes the base"),
        ({"lora_alpha": "8"}, "lora_alpha is '8'"),
        ({"use_rslora": 1}, "use_rslora is 1"),
    ],
)
def test_a_configuration_that_does_more_than_lora_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    model = add_adapter(tiny_policy().model, "one", config(tmp_path))
    folder = save_adapter(model, "one", tmp_path / "adapter", info(tiny_policy()), {})
    assert isinstance(read_lora(folder).target_modules, set)  # what this package writes
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(AdapterError, match=message) as error:
        read_lora(folder)
    assert str(file) in str(error.value)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's own
def test_all_linear_is_a_target(tmp_path: Path) -> None:
    LoraConfig(target_modules="all-linear").save_pretrained(str(tmp_path))
    assert read_lora(tmp_path).target_modules == "all-linear"


def test_statistics_have_the_key_that_the_adapter_names(tmp_path: Path) -> None:
    policy = tiny_policy()
    model = add_adapter(policy.model, "one", config(tmp_path))
    folder = save_adapter(model, "one", tmp_path / "adapter", info(policy), {"libero_goal_no_noops": {}})
    assert list(read_statistics(folder)) == ["libero_goal_no_noops"]
    folder = save_adapter(model, "one", tmp_path / "adapter", info(policy), {"content": {}})
    with pytest.raises(AdapterError, match=r"dataset_statistics\.json lacks 'libero_goal', which infovla\.json"):
        read_statistics(folder)


def test_a_mask_of_statistics_is_true_or_false(tmp_path: Path) -> None:
    (tmp_path / "dataset_statistics.json").write_text('{"a": {"action": {"mask": [true, [false]]}}}')
    with pytest.raises(AdapterError, match=r"statistics\.json: action, mask must be true or false each"):
        read_statistics(tmp_path)


def test_fields_of_later_versions_are_ignored(tmp_path: Path) -> None:
    policy = tiny_policy()
    folder = save_adapter(
        add_adapter(policy.model, "one", config(tmp_path)), "one", tmp_path / "adapter", info(policy), {}
    )
    content = json.loads((folder / "infovla.json").read_text())
    sums = content.pop("sha256")
    sums.pop("infovla.json")
    write_sealed(folder / "infovla.json", {**content, "invented_later": 1}, sums)
    assert read_info(folder) == replace(info(policy), sha256=sums)


# --- which base ---


def test_a_base_is_recognised_through_saving_dtype_adapters_and_training(tmp_path: Path) -> None:
    policy = tiny_policy()
    original = fingerprint(policy.model)
    policy.model.save_pretrained(tmp_path / "base")
    for dtype in (torch.float32, torch.bfloat16):
        loaded = OpenVLAForActionPrediction.from_pretrained(tmp_path / "base", dtype=dtype)
        assert fingerprint(loaded) == original
    model = add_adapter(policy.model, "one", config(tmp_path))
    randomise(model, "one")
    model.config.use_cache = False
    assert fingerprint(model) == original
    check_base(model, info(tiny_policy()))


def test_another_base_is_refused(tmp_path: Path) -> None:
    policy = tiny_policy()
    folder = save_adapter(
        add_adapter(policy.model, "one", config(tmp_path)), "one", tmp_path / "adapter", info(policy), {}
    )
    with pytest.raises(AdapterError, match=r"was trained on \.\./base, another base.*different weights; load it with"):
        load_adapter(tiny_policy(seed=1).model, folder, "one")
    changed = tiny_policy().model
    changed.config.num_actions_chunk += 1
    with pytest.raises(AdapterError, match="different config"):
        check_base(changed, replace(info(policy)))

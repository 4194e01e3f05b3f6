"""Loading policies: adapters, runs, checkpoints; which one is chosen; what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi
from local_hub import LocalHub
from tiny_run import SHAPE, STATISTICS, TASKS, act, build_run

from infovla_peft import load_policy
from infovla_peft.adapter_files import AdapterError, read_info, write_info
from infovla_peft.adapters import active_adapter
from infovla_peft.data.normalisation import Normaliser
from infovla_peft.inference import Policy
from infovla_peft.library import find_adapters
from infovla_peft.models.openvla import build_tiny_openvla


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run: a base that knows task 0, and the adapters of tasks 1 and 2."""
    return build_run(tmp_path_factory.mktemp("hub") / "run")


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "run"))


def test_what_is_loaded_from_a_run(original: Path) -> None:
    first, second = (adapter.folder for adapter in find_adapters(original))
    base, one, two = act(load_policy(original / "base")), act(load_policy(first)), act(load_policy(second))
    assert base != one != two != base
    chosen: list[tuple[Callable[[], Policy], list[list[float]]]] = [
        (lambda: load_policy(original), two),
        (lambda: load_policy(original, stage=0), base),
        (lambda: load_policy(original, stage=1), one),
        (lambda: load_policy(original, task="Turn on the stove"), one),
        (lambda: load_policy(original, task="close_the_door"), two),
        (lambda: load_policy(original, task="open the drawer"), base),
        (lambda: load_policy(original, task="open the drawer", stage=2), two),
    ]
    for load, expected in chosen:
        assert act(load()) == expected


def test_the_task_gives_the_instruction(original: Path) -> None:
    assert load_policy(original).instruction is None
    assert load_policy(original, task=TASKS[1]).instruction == "turn on the stove"
    assert load_policy(find_adapters(original)[1].folder).instruction == "close the door"
    policy = load_policy(original, task="open the drawer")
    assert act(policy, None) == act(policy)


def test_the_statistics_come_with_the_adapter(run: Path) -> None:
    adapter = find_adapters(run)[0].folder
    before = load_policy(adapter)
    wide = json.loads(json.dumps(STATISTICS))
    wide["libero_10"]["action"]["q99"] = [3.0] * 7
    (adapter / "dataset_statistics.json").write_text(json.dumps(wide))
    write_info(adapter, read_info(adapter))
    after = load_policy(adapter)
    assert isinstance(after.normaliser, Normaliser)
    normalised = np.array(act(before))[:, :6]  # of bounds [-1, 1]
    np.testing.assert_allclose(np.array(act(after))[:, :6], (normalised + 1) * 2 - 1, atol=1e-5)


def test_a_base_elsewhere_must_be_the_same_base(run: Path, tmp_path: Path) -> None:
    adapter = find_adapters(run)[0].folder
    expected = act(load_policy(adapter))
    shutil.move(run / "base", tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match="put it back, or give load_policy its place"):
        load_policy(adapter)
    assert act(load_policy(adapter, base=tmp_path / "moved")) == expected
    other, processor = build_tiny_openvla(instructions=["x"], **SHAPE, seed=1)
    other.save_pretrained(tmp_path / "other")
    processor.save_pretrained(tmp_path / "other")
    with pytest.raises(AdapterError, match="another base"):
        load_policy(adapter, base=tmp_path / "other")
    for absent in ("base", "runs/old/base", tmp_path / "absent"):
        with pytest.raises(FileNotFoundError, match="no Hub id user/name has this form; correct `base`"):
            load_policy(adapter, base=absent)


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", torch.bfloat16, "float16", torch.float16])
def test_the_type_of_the_weights_is_chosen_as_in_transformers(original: Path, dtype: Any) -> None:
    """In half precision the base is still the one that the adapter was trained on."""
    policy = load_policy(original, task="turn on the stove", dtype=dtype)
    wanted = {"auto": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}.get(dtype, dtype)
    assert policy.model.dtype == wanted
    of_the_base = {parameter.dtype for name, parameter in policy.model.named_parameters() if ".lora_" not in name}
    adapters = {parameter.dtype for name, parameter in policy.model.named_parameters() if ".lora_" in name}
    assert (of_the_base, adapters) == ({wanted}, {torch.float32})
    expected = act(load_policy(original), "close the door")
    np.testing.assert_allclose(act(policy.use("close the door"), None), expected, atol=0.05)


def test_a_device_that_is_not_there_is_named(original: Path) -> None:
    for device in ("cuda:99", "nonsense"):
        with pytest.raises(ValueError, match=f"the device '{device}' cannot be used here .*; cpu always can"):
            load_policy(original, device=device)
    with pytest.raises(ValueError, match="stage must be an integer, got '1'"):
        load_policy(original, stage="1")  # type: ignore[arg-type]
    assert active_adapter(load_policy(original, stage=np.int64(1)).model) == "stage_01"  # type: ignore[arg-type]


def test_a_type_that_does_not_exist_is_named(original: Path) -> None:
    with pytest.raises(ValueError, match=r"a valid `torch\.dtype`"):
        load_policy(original, dtype="bf16")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "juggle"}, "has learned no task 'juggle'"),
        ({"stage": 7}, "no adapter of stage 7; it has: stage 1, KITCHEN_SCENE3"),
        ({"stage": 1, "task": "close the door"}, "has learned no task"),
    ],
)
def test_an_unknown_choice_lists_what_there_is(original: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_policy(original, **options)  # type: ignore[arg-type]


def test_statistics_that_are_not_there_are_named_before_weights_are_read(run: Path) -> None:
    for file in [*run.glob("base/*.safetensors"), *run.glob("adapters/*/*.safetensors")]:
        file.unlink()
    for place in (run, run / "base", find_adapters(run)[0].folder):
        for stage in (None, 0):
            with pytest.raises(ValueError, match=r"^no statistics for 'absent'; set unnorm_key to one of: libero_10$"):
                load_policy(place, unnorm_key="absent", stage=stage)
    described = run / "base" / "dataset_statistics.json"
    described.write_text(json.dumps({**STATISTICS, "libero_90": STATISTICS["libero_10"]}))
    with pytest.raises(KeyError, match="several data sets have statistics here; set unnorm_key to one of"):
        load_policy(run / "base")
    described.unlink()
    config = json.loads((run / "base" / "config.json").read_text())
    (run / "base" / "config.json").write_text(json.dumps({**config, "norm_stats": None}))
    with pytest.raises(ValueError, match=r"^the base model has no action statistics"):
        load_policy(run / "base")
    (run / "base" / "config.json").write_text(json.dumps({**config, "model_type": "llama", "norm_stats": None}))
    with pytest.raises(ValueError, match="is no OpenVLA checkpoint"):
        load_policy(run / "base")


@pytest.mark.parametrize("included", [False, True])
def test_no_weights_are_fetched_for_statistics_that_are_not_there(
    hub: LocalHub, original: Path, tmp_path: Path, included: bool
) -> None:
    """Of a checkpoint on the Hub, of an adapter with its base beside it, and of one whose base lies elsewhere."""
    folders = {"": original / "base"}
    if included:
        stages = {f"stage_{number:02d}/": adapter.folder for number, adapter in enumerate(find_adapters(original), 1)}
        folders = {"base/": original / "base", **stages}
        for name, adapter in stages.items():
            copy = shutil.copytree(adapter, tmp_path / name)
            write_info(copy, replace(read_info(copy), base_model="../base"))
            folders[name] = copy
    token = hub.token("me")
    HfApi(token=token).create_repo("me/policy")
    files = {name + file.name: file.read_bytes() for name, folder in folders.items() for file in folder.iterdir()}
    hub.put("me/policy", files)

    def refused(place: str | Path, **options: Any) -> None:
        with pytest.raises(KeyError, match="no statistics for 'absent'"):
            load_policy(place, unnorm_key="absent", token=token, **options)
        assert not list((tmp_path / "cache").rglob("*.safetensors"))

    refused("me/policy")
    if included:
        refused("me/policy", stage=0)
    else:
        refused(original, base="me/policy", stage=0)
    expected = act(load_policy(original, stage=0))
    assert act(load_policy("me/policy", stage=0, token=token)) == expected


def test_a_task_whose_adapter_is_not_there_is_not_the_base_s(run: Path) -> None:
    """A folder of a later stage alone knows of the tasks before it, but not how to do them."""
    later = find_adapters(run)[1].folder
    for tasks in ([], [{"name": name, "instruction": "", "stage": stage} for stage, name in enumerate(TASKS)]):
        write_info(later, replace(read_info(later), tasks=tasks))
        with pytest.raises(ValueError, match="no task 'turn on the stove', but stage=2 came after it"):
            load_policy(later, task="turn on the stove")
        policy = load_policy(later, task="turn on the stove", stage=2)
        assert (active_adapter(policy.model), policy.instruction) == ("stage_02", "turn on the stove")
    assert policy.tasks == [TASKS[0], TASKS[2]]
    assert active_adapter(policy.use("open the drawer").model) is None  # which the base has learned
    with pytest.raises(ValueError, match="has learned no task"):
        load_policy(run, task="turn on the stove", stage=0)


def test_fields_of_the_wrong_type_and_deep_nesting_are_named(run: Path) -> None:
    folder = find_adapters(run)[0].folder
    file = folder / "infovla.json"
    content = json.loads(file.read_text())
    content.pop("sha256")
    for name, value in (("base_fingerprint", ["a"]), ("cameras", "agentview"), ("stage", "1"), ("training", [])):
        file.write_text(json.dumps({**content, "format_version": 1, name: value}))
        with pytest.raises(AdapterError, match=rf"infovla\.json: {name} must be .*train the adapter again"):
            load_policy(folder)
    file.write_text(json.dumps({**content, "format_version": 1}))
    load_policy(folder)
    for text in ("[" * 100_000, "[]", '{"libero_10": 3}'):
        (folder / "dataset_statistics.json").write_text(text)
        with pytest.raises(AdapterError, match=r"dataset_statistics\.json.*train the adapter again"):
            load_policy(folder)


def test_damaged_or_missing_files_are_named(run: Path, tmp_path: Path) -> None:
    adapter = find_adapters(run)[0].folder
    (adapter / "dataset_statistics.json").write_text("{")
    with pytest.raises(AdapterError, match=r"dataset_statistics\.json is .*damaged"):
        load_policy(adapter)
    (adapter / "dataset_statistics.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"dataset_statistics\.json is missing"):
        load_policy(adapter)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no adapter"):
        load_policy(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        load_policy(tmp_path / "absent")

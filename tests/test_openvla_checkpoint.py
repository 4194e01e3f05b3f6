"""Saving and loading: folders of the hub's kind, of OpenVLA-OFT, our own, and damaged ones."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi
from local_hub import LocalHub
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor

from infovla_peft.adapter_files import AdapterError, AdapterInfo
from infovla_peft.adapters import add_adapter, fingerprint, save_adapter
from infovla_peft.config import InfoVLAConfig
from infovla_peft.foreign import fingerprint_of_files
from infovla_peft.hub import load_policy
from infovla_peft.models.openvla import (
    OpenVLAConfig,
    OpenVLAForActionPrediction,
    OpenVLAImageProcessor,
    OpenVLAProcessor,
    build_tiny_openvla,
    load_openvla,
)

SMALL: dict[str, Any] = {
    "instructions": ["open the drawer"],
    "image_size": 32,
    "vision_width": 32,
    "vision_depth": 2,
    "hidden_size": 32,
    "layers": 2,
    "heads": 2,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    model, processor = build_tiny_openvla(**SMALL)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def assert_same_weights(first: torch.nn.Module, second: torch.nn.Module) -> None:
    a, b = first.state_dict(), second.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(value, b[name]) for name, value in a.items())


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def edit_json(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_save_and_load_is_bit_identical(saved: Path, tmp_path: Path) -> None:
    model, processor = load_openvla(saved)
    assert not model.training
    assert_same_weights(model, build_tiny_openvla(**SMALL)[0])
    model.save_pretrained(tmp_path, max_shard_size="500KB")
    processor.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again, processor_again = load_openvla(tmp_path)
    assert_same_weights(again, model)
    assert (tmp_path / "config.json").read_text() == (saved / "config.json").read_text()
    assert processor_again.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert processor_again.image_processor.to_dict() == processor.image_processor.to_dict()
    assert load_openvla(saved, dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_published_sizes() -> None:
    """Tensors and parameters of openvla-7b, and of what OpenVLA-OFT adds to it."""
    config = OpenVLAConfig(
        vision_backbone_id="dinosiglip-vit-so-224px",
        llm_backbone_id="llama2-7b-pure",
        text_config={"vocab_size": 32064, "pad_token_id": 32000},
        decoding="parallel",
        action_head="l1",
        proprio_dim=8,
        use_film=True,
    )
    with torch.device("meta"):
        model = OpenVLAForActionPrediction(config)
    sizes = {name: value.numel() for name, value in model.state_dict().items()}
    parts = {"action_head": 0, "proprio_projector": 0, "film": 0}
    for name in list(sizes):
        part = "film" if ".scale." in name or ".shift." in name else name.split(".")[0]
        if part in parts:
            parts[part] += sizes.pop(name)
    assert (len(sizes), sum(sizes.values())) == (982, 7_541_237_184)
    assert parts == {"action_head": 151_117_831, "proprio_projector": 16_818_176, "film": 456_241_920}


def test_auto_classes_find_the_native_classes_even_where_remote_code_is_named(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    (tmp_path / "processor_config.json").unlink()  # the hub's folders have none
    remote = {"AutoConfig": "configuration_prismatic.OpenVLAConfig", "AutoModelForVision2Seq": "modeling_prismatic.X"}
    edit_json(tmp_path / "config.json", auto_map=remote)
    edit_json(
        tmp_path / "preprocessor_config.json",
        processor_class="PrismaticProcessor",
        auto_map={"AutoImageProcessor": "processing_prismatic.A", "AutoProcessor": "processing_prismatic.B"},
    )
    assert isinstance(AutoConfig.from_pretrained(tmp_path), OpenVLAConfig)
    assert isinstance(AutoImageProcessor.from_pretrained(tmp_path), OpenVLAImageProcessor)
    assert isinstance(AutoProcessor.from_pretrained(tmp_path), OpenVLAProcessor)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert isinstance(model, OpenVLAForActionPrediction)
    model.save_pretrained(tmp_path / "again")
    assert "auto_map" not in json.loads((tmp_path / "again" / "config.json").read_text())


def test_statistics_beside_the_weights_win(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    statistics = {"other": {"action": {"q01": [0.0] * 7, "q99": [1.0] * 7}}}
    (tmp_path / "dataset_statistics.json").write_text(json.dumps(statistics))
    assert load_openvla(tmp_path)[0].norm_stats == statistics
    (tmp_path / "dataset_statistics.json").unlink()
    assert "tiny" in load_openvla(tmp_path)[0].norm_stats
    (tmp_path / "dataset_statistics.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        load_openvla(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: (state.pop("projector.fc1.bias"), state.pop("action_head.model.fc2.weight")),
            r"lacks 2 weight\(s\): action_head.model.fc2.weight, projector.fc1.bias",
        ),
        (
            lambda state: state.update({"projector.extra": torch.zeros(2)}),
            r"holds, beyond .* 1 weight\(s\): projector.extra",
        ),
        (lambda state: state.update({"projector.fc1.bias": torch.zeros(2)}), r"projector.fc1.bias \(2,\) \(32,\)"),
    ],
    ids=["missing", "extra", "shape"],
)
def test_wrong_weights_are_named(saved: Path, tmp_path: Path, change: Any, message: str) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    edit_weights(tmp_path, change)
    for load in (load_openvla, AutoModelForImageTextToText.from_pretrained):
        with pytest.raises(ValueError, match=message):
            load(tmp_path)


def damage(file: str, action: Callable[[Path], Any]) -> Callable[[Path], Any]:
    return lambda folder: action(folder / file)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (damage("config.json", Path.unlink), FileNotFoundError, r"holds no config\.json"),
        (
            damage("config.json", lambda file: edit_json(file, model_type="llama")),
            ValueError,
            "is no OpenVLA checkpoint",
        ),
        (damage("model.safetensors", Path.unlink), OSError, r"model\.safetensors"),
        (
            damage("model.safetensors", lambda file: file.write_bytes(file.read_bytes()[:5000])),
            ValueError,
            "damaged or truncated",
        ),
        (damage("tokenizer.json", Path.unlink), ValueError, r"tokenizer\.json"),
        (shutil.rmtree, FileNotFoundError, "There is no folder"),
    ],
    ids=["no config", "other model", "no weights", "truncated", "no tokeniser", "no folder"],
)
def test_folders_that_are_no_openvla(
    saved: Path, tmp_path: Path, change: Any, error: type[Exception], message: str
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    change(folder)
    with pytest.raises(error, match=message):
        load_openvla(folder)


def split_into_oft_files(model: OpenVLAForActionPrediction, folder: Path, prefix: str = "module.") -> None:
    """Move what OpenVLA-OFT keeps in files of its own out of model.safetensors, as its training code saves it."""
    state = model.state_dict()
    for component in ("action_head", "proprio_projector"):
        part = {
            name.removeprefix(f"{component}."): state.pop(name) for name in list(state) if name.startswith(component)
        }
        if part:
            file = folder / f"{component}--50_checkpoint.pt"
            torch.save({prefix + name: value for name, value in part.items()}, file)
    save_file(
        {k: v for k, v in state.items() if ".scale." not in k and ".shift." not in k},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = json.loads((folder / "config.json").read_text())
    for field in (
        "decoding", "action_head", "proprio_dim", "use_film", "num_images_in_input", "action_dim",
        "num_actions_chunk", "action_normalization",
    ):  # fmt: skip
        del config[field]
    (folder / "config.json").write_text(json.dumps(config))


def film_state(model: OpenVLAForActionPrediction) -> dict[str, Tensor]:
    """The vision backbone under the names that OpenVLA-OFT's FiLM wrappers give it."""
    state = {}
    for name, value in model.vision_backbone.state_dict().items():
        renamed = name
        head, dot, tail = name.partition(".blocks.")
        if dot and ".scale." not in name and ".shift." not in name:
            index, tail = tail.split(".", 1)
            renamed = f"{head}.blocks.{index}.block.{tail}"
        state[f"vision_backbone.{renamed}"] = value
    return state


@pytest.mark.parametrize("prefix", ["module.", ""])
def test_oft_files_are_found_and_loaded(saved: Path, tmp_path: Path, prefix: str) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    model, _ = load_openvla(saved)
    split_into_oft_files(model, tmp_path, prefix)
    again, _ = load_openvla(tmp_path)
    assert_same_weights(again, model)
    assert (again.config.decoding, again.config.action_head, again.config.proprio_dim) == ("parallel", "l1", 8)
    discrete, _ = load_openvla(tmp_path, decoding="parallel", action_head="discrete", proprio_dim=0)
    assert not hasattr(discrete, "action_head")
    for component in ("action_head", "proprio_projector"):  # other names that people give them
        (tmp_path / f"{component}--50_checkpoint.pt").rename(tmp_path / f"{component}--latest.pt")
    renamed, _ = load_openvla(tmp_path)
    assert_same_weights(renamed, model)
    shutil.copy(tmp_path / "action_head--latest.pt", tmp_path / "action_head--60_checkpoint.pt")
    with pytest.raises(ValueError, match="several action_head files"):
        load_openvla(tmp_path)


def test_auto_classes_and_a_given_configuration_find_the_oft_files(saved: Path, tmp_path: Path) -> None:
    """Both read config.json alone, which says nothing of them: the model was loaded as plain OpenVLA, silently."""
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    model, _ = load_openvla(saved)
    split_into_oft_files(model, tmp_path)
    plain = OpenVLAConfig.from_pretrained(tmp_path)
    assert plain.decoding == "autoregressive"
    for again in (
        AutoModelForImageTextToText.from_pretrained(tmp_path),
        OpenVLAForActionPrediction.from_pretrained(tmp_path, config=plain),
    ):
        assert_same_weights(again, model)
        config = again.config
        assert (config.decoding, config.action_head, config.proprio_dim) == ("parallel", "l1", 8)
    assert (plain.decoding, plain.proprio_dim) == ("autoregressive", 0)  # the caller's own
    assert AutoModelForImageTextToText.from_pretrained(tmp_path, images=2).config.num_images_in_input == 2
    plain.num_images_in_input, plain.num_actions_chunk = 2, 3
    config = OpenVLAForActionPrediction.from_pretrained(tmp_path, config=plain).config
    assert (config.num_images_in_input, config.num_actions_chunk) == (2, 3)
    with pytest.raises(ValueError, match=r"reads 2 image\(s\), not 1"):
        OpenVLAForActionPrediction.from_pretrained(tmp_path, config=plain, images=1)


def test_a_configuration_that_says_otherwise_is_kept(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    split_into_oft_files(load_openvla(saved)[0], tmp_path)
    discrete = OpenVLAConfig.from_pretrained(tmp_path, decoding="parallel")
    model = OpenVLAForActionPrediction.from_pretrained(tmp_path, config=discrete)
    assert not hasattr(model, "action_head")
    assert not hasattr(model, "proprio_projector")
    plain, _ = load_openvla(tmp_path, decoding="autoregressive")
    assert plain.config.decoding == "autoregressive"
    edit_json(tmp_path / "config.json", decoding="autoregressive")
    for model in (
        AutoModelForImageTextToText.from_pretrained(tmp_path),
        OpenVLAForActionPrediction.from_pretrained(tmp_path, config=plain.config),
    ):
        assert model.config.decoding == "autoregressive"
        assert_same_weights(model, plain)


@pytest.mark.parametrize(
    ("action", "proprio", "chunk", "bounds"),
    [
        (7, 8, 8, "bounds_q99"),
        (14, 14, 25, "bounds"),
        (7, 7, 5, "bounds_q99"),
        (7, 0, 8, "bounds_q99"),
        (14, 0, 25, "bounds"),
    ],
    ids=["LIBERO", "ALOHA", "Bridge", "no proprioception", "ALOHA without"],
)
def test_the_robot_of_an_oft_folder_is_told_by_its_sizes(
    tmp_path: Path, action: int, proprio: int, chunk: int, bounds: str
) -> None:
    """The original saves neither the length of a chunk nor the kind of normalisation."""
    model, processor = build_tiny_openvla(**SMALL, action_dim=action, proprio_dim=proprio, chunk=chunk)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    split_into_oft_files(model, tmp_path)
    again, _ = load_openvla(tmp_path)
    config = again.config
    assert (config.action_dim, config.proprio_dim) == (action, proprio)
    assert (config.num_actions_chunk, config.action_normalization) == (chunk, bounds)
    assert_same_weights(again, model)
    assert load_openvla(tmp_path, num_actions_chunk=3)[0].config.num_actions_chunk == 3
    edit_json(tmp_path / "config.json", num_actions_chunk=12)
    config = load_openvla(tmp_path)[0].config
    assert (config.num_actions_chunk, config.action_normalization) == (12, bounds)
    if proprio == 14:  # the head that writes tokens has no file: the size of an action is the robot's
        (tmp_path / "action_head--50_checkpoint.pt").unlink()
        config = load_openvla(tmp_path)[0].config
        assert (config.action_head, config.action_dim, config.proprio_dim) == ("discrete", 14, 14)


def test_an_oft_folder_of_an_unknown_robot_must_say_its_chunk(tmp_path: Path) -> None:
    model, processor = build_tiny_openvla(**SMALL, action_dim=6, proprio_dim=9)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    split_into_oft_files(model, tmp_path)
    message = r"6 numbers in an action and 9 of proprioception.* ALOHA 14 and 14.*Write num_actions_chunk and"
    for said in ({}, {"num_actions_chunk": 4}):
        edit_json(tmp_path / "config.json", **said)
        with pytest.raises(ValueError, match=message):
            load_openvla(tmp_path)
    edit_json(tmp_path / "config.json", action_normalization="bounds")
    config = load_openvla(tmp_path)[0].config
    assert (config.action_dim, config.proprio_dim) == (6, 9)
    assert (config.num_actions_chunk, config.action_normalization) == (4, "bounds")


def test_weights_that_may_hold_code_are_not_loaded(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    for load in (load_openvla, load_policy):
        with pytest.raises(FileNotFoundError, match="lacks its weights in the safetensors format"):
            load(tmp_path)


@pytest.mark.parametrize("content", ["[1]", "null", "{bad"])
def test_a_configuration_that_is_none_is_named(saved: Path, tmp_path: Path, content: str) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"the config\.json of '.*' is damaged .*; copy it again"):
        load_openvla(tmp_path)


def test_how_many_images_an_oft_folder_reads_is_said_from_outside(saved: Path, tmp_path: Path) -> None:
    """Its code is told at run time, and its files are the same either way."""
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    split_into_oft_files(load_openvla(saved)[0], tmp_path)
    assert load_openvla(tmp_path, images=2)[0].config.num_images_in_input == 2
    with pytest.warns(UserWarning, match="does not say how many images it reads"):
        assert load_policy(tmp_path).cameras == ("agentview",)
    policy = load_policy(tmp_path, cameras=["agentview", "robot0_eye_in_hand"])
    assert policy.cameras == ("agentview", "robot0_eye_in_hand")
    image = np.zeros((32, 32, 3), np.uint8)
    assert policy.act([image, image], "open the drawer", np.zeros(8)).shape[1] == 7
    model, processor = load_openvla(tmp_path, images=2)
    model.save_pretrained(tmp_path / "anew")
    processor.save_pretrained(tmp_path / "anew")
    assert load_policy(tmp_path / "anew").cameras == ("agentview", "robot0_eye_in_hand")  # now it says so
    for folder, says, given in ((tmp_path / "anew", 2, 1), (saved, 1, 2)):
        with pytest.raises(ValueError, match=rf"reads {says} image\(s\), not {given}: leave `images` out"):
            load_openvla(folder, images=given)
        assert load_openvla(folder, images=says)[0].config.num_images_in_input == says
    with pytest.raises(ValueError, match=r"reads 2 image\(s\), not 1: leave .*`cameras`"):
        load_policy(tmp_path / "anew", cameras="agentview")


@pytest.mark.parametrize("oft", [False, True])
@pytest.mark.parametrize("published", [False, True])
def test_a_checkpoint_may_lie_in_a_subfolder(
    saved: Path, tmp_path: Path, hub: LocalHub, oft: bool, published: bool
) -> None:
    """Weights, processor, statistics and the files of OpenVLA-OFT, of which the root has none."""
    folder = shutil.copytree(saved, tmp_path / "run" / "models" / "base")
    model = load_openvla(saved)[0]
    if oft:
        split_into_oft_files(model, folder)
    (folder / "dataset_statistics.json").write_text(json.dumps({"here": model.norm_stats["tiny"]}))
    (tmp_path / "run" / "dataset_statistics.json").write_text("{}")
    place, options = str(tmp_path / "run"), dict[str, str]()
    if published:
        place, options = "me/run", {"token": hub.token("me")}
        HfApi(**options).create_repo(place)
        files = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
        hub.put(place, {file.relative_to(tmp_path / "run").as_posix(): file.read_bytes() for file in files})
    found, processor = load_openvla(place, subfolder="models/base", **options)
    assert_same_weights(found, model)
    assert list(found.norm_stats) == ["here"]
    assert processor.image_processor.input_sizes == [[3, 32, 32]]
    assert processor.tokenizer("open the drawer").input_ids
    with pytest.raises((FileNotFoundError, ValueError), match=r"run/models' .* no OpenVLA checkpoint"):
        load_openvla(place, subfolder="models", **options)


def wrap_in_lora(state: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Give two layers of OpenVLA-OFT's FiLM file LoRA matrices; returns what they are once merged, by plain names."""
    merged: dict[str, Tensor] = {}
    if not rank:
        return merged
    for layer in ("blocks.0.attn.qkv", "patch_embed.proj"):
        inner = f"vision_backbone.featurizer.{layer.replace('blocks.0.', 'blocks.0.block.')}"
        weight = state.pop(f"{inner}.weight")
        bias = state.pop(f"{inner}.bias")
        down = torch.randn(rank, *weight.shape[1:])
        up = torch.randn(len(weight), rank, *[1] * (weight.dim() - 2))
        state |= {f"{inner}.base_layer.weight": weight, f"{inner}.base_layer.bias": bias}
        state |= {f"{inner}.lora_A.default.weight": down, f"{inner}.lora_B.default.weight": up}
        delta = (up.flatten(1) @ down.flatten(1)).view_as(weight) * min(rank, 16) / rank
        merged[f"featurizer.{layer}.weight"] = weight + delta
    return merged


@pytest.mark.parametrize("rank", [0, 4, 32])
def test_film_file_is_unwrapped_and_its_lora_merged(saved: Path, tmp_path: Path, rank: int) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    edit_json(tmp_path / "config.json", use_film=True)
    config = OpenVLAConfig.from_pretrained(tmp_path)
    torch.manual_seed(0)
    model = OpenVLAForActionPrediction(config)
    split_into_oft_files(model, tmp_path)
    state = film_state(model)
    expected = {name: value.clone() for name, value in model.vision_backbone.state_dict().items()}
    expected |= wrap_in_lora(state, rank)
    torch.save(state, tmp_path / "vision_backbone--50_checkpoint.pt")
    again, _ = load_openvla(tmp_path)
    assert again.config.use_film
    for name, value in again.vision_backbone.state_dict().items():
        torch.testing.assert_close(value, expected[name])
    again.save_pretrained(tmp_path / "native")
    assert_same_weights(OpenVLAForActionPrediction.from_pretrained(tmp_path / "native"), again)


def test_an_adapter_of_an_oft_folder_goes_onto_it_in_half_precision(saved: Path, tmp_path: Path) -> None:
    """The fingerprint of its files is that of the model, with heads and a vision tower from files of their own."""
    folder = shutil.copytree(saved, tmp_path / "base")
    edit_json(folder / "config.json", use_film=True)
    config = OpenVLAConfig.from_pretrained(folder)
    split_into_oft_files(OpenVLAForActionPrediction(config), folder)
    film = film_state(OpenVLAForActionPrediction(config))  # other weights than those that it replaces
    wrap_in_lora(film, 4)
    torch.save(film, folder / "vision_backbone--50_checkpoint.pt")
    extra = {"language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}  # not loaded
    edit_weights(folder, lambda state: state.update(extra))
    model, _ = load_openvla(folder)
    assert fingerprint_of_files(folder, model, {}) == fingerprint(model)
    options = InfoVLAConfig(output_dir=str(tmp_path / "run"), use_cpu=True, lora_r=2, report_to="none")
    adapted = add_adapter(model, "one", options)
    info = AdapterInfo(str(folder), fingerprint(adapted), "tiny", cameras=["agentview"])
    adapter = save_adapter(adapted, "one", tmp_path / "adapter", info, model.norm_stats)
    assert load_policy(adapter, dtype="float16").model.dtype == torch.float16
    head = torch.load(folder / "action_head--50_checkpoint.pt", weights_only=True)
    torch.save({name: value + 1 for name, value in head.items()}, folder / "action_head--50_checkpoint.pt")
    with pytest.raises(AdapterError, match="another base"):
        load_policy(adapter, dtype="float16")


def test_other_heads_and_pickles_are_refused(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    split_into_oft_files(load_openvla(saved)[0], tmp_path)
    torch.save({"noise_predictor.weight": torch.zeros(1)}, tmp_path / "action_head--50_checkpoint.pt")
    with pytest.raises(ValueError, match="diffusion heads are not supported"):
        load_openvla(tmp_path)
    ran = tmp_path / "ran"
    head = tmp_path / "action_head--50_checkpoint.pt"
    weight = {"model.fc2.weight": torch.zeros(7, 4)}

    def damaged(content: object) -> bytes:
        buffer = io.BytesIO()
        torch.save(content, buffer)
        return buffer.getvalue()

    class Code:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(ran),)

    for content in (
        damaged({"model": Path("x")}),
        damaged({**weight, "more": Code()}),
        damaged([torch.zeros(1)]),
        damaged({**weight, "more": 1}),
        damaged({**weight, 1: torch.zeros(1)}),
        damaged(weight)[:300],
        b"",
        b"garbage" * 100,
        b"\x80\x04.",
    ):
        head.write_bytes(content)
        with pytest.raises(
            ValueError, match=r"action_head--50_checkpoint\.pt' is no state dict of tensors"
        ) as refused:
            load_openvla(tmp_path)
        assert refused.value.__suppress_context__ or refused.value.__context__ is None  # torch's own advice
    assert not ran.exists()
    head.unlink()
    torch.save(weight, tmp_path / "proprio_projector--50_checkpoint.pt")
    with pytest.raises(ValueError, match=r"proprio_projector--50_checkpoint\.pt' is no proprio projector"):
        load_openvla(tmp_path)
    (tmp_path / "proprio_projector--50_checkpoint.pt").unlink()
    edit_json(tmp_path / "config.json", use_film=True, decoding="parallel")
    alone = {"vision_backbone.featurizer.patch_embed.proj.lora_A.default.weight": torch.zeros(4, 4)}
    torch.save(alone, tmp_path / "vision_backbone--50_checkpoint.pt")
    with pytest.raises(ValueError, match=r"vision_backbone--50_checkpoint\.pt' does not fit the configuration"):
        load_openvla(tmp_path)

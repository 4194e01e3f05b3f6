"""The model against outputs recorded from the original OpenVLA and OpenVLA-OFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from double_precision import compute_in_double
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers.models.llama import modeling_llama

from infovla_peft.models.openvla import (
    ActionTokenizer,
    OpenVLAForActionPrediction,
    OpenVLAImageProcessor,
    OpenVLAProcessor,
    assert_policy_sees_image,
    load_openvla,
)

pytestmark = pytest.mark.shared
INPUTS = ("input_ids", "attention_mask", "pixel_values", "labels")


def single_precision_bounds() -> tuple[float, float]:
    """Of the largest value, and of a gradient's norm (relative): as this processor rounds, see below."""
    facts = Path("/proc/cpuinfo")
    made_by_amd = facts.exists() and "AuthenticAMD" in facts.read_text()
    wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    if wide and made_by_amd:
        return 1e-6, 1e-6
    return (5e-6, 5e-6) if wide else (3e-6, 1e-5)


# The references hold single precision, recorded on an AMD processor with AVX-512, and are up to 1.2e-5 of their
# largest value away from the same computation in double precision. Other processors add up in another order (MKL and
# oneDNN choose by maker and instruction set) and are as far away on another side: the original code, run on an Intel
# processor with AVX-512, is 4.1e-6 off its own recording (a gradient; norms: 2.4e-6), on an AMD one with AVX2 2.7e-6
# (norms: 4.7e-6), and this package equals the original there bit for bit (parallel decoding with proprioception:
# within 1.0e-6). That both are one function is what the tests in double precision say, at 1e-12 on all of them.
TOLERANCE, NORM_TOLERANCE = single_precision_bounds()


def assert_close(got: Any, reference: Tensor) -> None:
    """At most 1e-6 of the reference's largest value apart, as far as the processor rounds alike."""
    got = torch.as_tensor(got)
    assert got.shape == reference.shape
    difference = (got.detach().double() - reference.double()).abs().max().item()
    assert difference <= TOLERANCE * max(1.0, reference.abs().max().item())


@pytest.fixture(scope="module")
def golden(shared: Path) -> Path:
    return shared / "golden"


@pytest.fixture(scope="module")
def meta(golden: Path) -> dict[str, Any]:
    return json.loads((golden / "golden.json").read_text())  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def reference(golden: Path) -> dict[str, Tensor]:
    return load_file(golden / "golden_fused.safetensors")


@pytest.fixture
def fused(golden: Path) -> tuple[OpenVLAForActionPrediction, OpenVLAProcessor]:
    return load_openvla(golden / "tiny-openvla-fused")


def test_forward_equals_the_original(fused: Any, reference: dict[str, Tensor]) -> None:
    model, _ = fused
    with torch.no_grad():
        output = model(**{name: reference[f"train/{name}"] for name in INPUTS}, output_hidden_states=True)
    mask = reference["train/multimodal_attention_mask"].bool()
    assert_close(output.loss, reference["train/loss"][0])
    assert_close(output.projector_features, reference["train/projector_features"])
    assert len(output.hidden_states) == 4
    for index, hidden in enumerate(output.hidden_states):
        assert_close(hidden[mask], reference[f"train/hidden_states.{index}"][mask])
    assert_close(output.logits[..., 31744:32000][mask], reference["train/logits_action_ids"][mask])
    assert_close(output.logits.logsumexp(-1)[mask], reference["train/logits_lse"][mask])
    assert torch.equal(output.logits.argmax(-1)[mask], reference["train/logits_argmax"][mask])


@pytest.fixture(scope="module")
def double() -> dict[str, Tensor]:
    """What the original code computes in double precision: `record_double.py`."""
    return load_file(Path(__file__).parent / "golden_double.safetensors")


def assert_equal_in_double(got: Tensor, reference: Tensor) -> None:
    assert got.dtype == reference.dtype == torch.float64
    assert got.shape == reference.shape
    assert (got.detach() - reference).abs().max() <= 1e-12 * max(1.0, reference.abs().max().item())


def test_training_step_equals_the_original_in_double_precision(
    fused: Any, reference: dict[str, Tensor], double: dict[str, Tensor]
) -> None:
    model, _ = fused
    model.double()
    inputs = {name: reference[f"train/{name}"] for name in INPUTS}
    inputs["pixel_values"] = inputs["pixel_values"].double()
    with compute_in_double(model, modeling_llama):
        output = model(**inputs, output_hidden_states=True)
        output.loss.backward()
    mask = reference["train/multimodal_attention_mask"].bool()
    assert_equal_in_double(output.loss, double["openvla/loss"])
    assert_equal_in_double(output.projector_features, double["openvla/projector_features"])
    assert_equal_in_double(output.hidden_states[-1][mask], double["openvla/hidden"])
    assert_equal_in_double(output.logits.logsumexp(-1)[mask], double["openvla/logits_lse"])
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    norms = {key: value for key, value in double.items() if key.startswith("openvla/grad_norm.")}
    assert {f"openvla/grad_norm.{name}" for name in gradients} == norms.keys()
    for name, gradient in gradients.items():
        assert_equal_in_double(gradient.norm(), norms[f"openvla/grad_norm.{name}"])
        if f"openvla/grad.{name}" in double:
            assert_equal_in_double(gradient, double[f"openvla/grad.{name}"])


def test_text_alone_equals_the_original(fused: Any, reference: dict[str, Tensor]) -> None:
    model, _ = fused
    inputs = {name: reference[f"train/{name}"] for name in INPUTS if name != "pixel_values"}
    with torch.no_grad():
        output = model(**inputs)
    mask = inputs["attention_mask"].bool()
    assert_close(output.loss, reference["textonly/loss"][0])
    assert_close(output.logits[..., 31744:32000][mask], reference["textonly/logits_action_ids"][mask])


@pytest.mark.parametrize("return_logits", [None, False])
def test_gradients_of_every_parameter(
    fused: Any, reference: dict[str, Tensor], meta: dict[str, Any], return_logits: bool | None
) -> None:
    model, _ = fused
    output = model(**{name: reference[f"train/{name}"] for name in INPUTS}, return_logits=return_logits)
    assert (output.logits is None) == (return_logits is False)
    output.loss.backward()
    norms = meta["variants"]["fused"]["grad_norms"]
    parameters = dict(model.named_parameters())
    assert parameters.keys() == norms.keys()
    for name, norm in norms.items():
        gradient = parameters[name].grad
        assert (gradient is None) == (norm is None), name
        if gradient is not None:
            assert gradient.norm().item() == pytest.approx(norm, rel=NORM_TOLERANCE, abs=1e-6), name
            if f"train/grad.{name}" in reference:
                assert_close(gradient, reference[f"train/grad.{name}"])


def test_state_dict_has_the_hub_names_and_shapes(fused: Any, meta: dict[str, Any]) -> None:
    model, _ = fused
    variant = meta["variants"]["fused"]
    shapes = next(
        value for value in variant.values() if isinstance(value, dict) and isinstance(next(iter(value.values())), list)
    )
    assert {name: list(value.shape) for name, value in model.state_dict().items()} == {
        name: shape for name, (shape, _) in shapes.items()
    }


def test_predicted_actions_equal_the_original(fused: Any, reference: dict[str, Tensor], meta: dict[str, Any]) -> None:
    model, _ = fused
    for case in meta["variants"]["fused"]["predict"]:
        key, unnorm_key = case["key"], case["unnorm_key"]
        inputs = {name: reference[f"{key}/{name}"] for name in INPUTS[:3]}
        action = model.predict_action(**inputs, unnorm_key=unnorm_key, do_sample=False)
        assert_close(action, reference[f"{key}/{unnorm_key}/action"])
        assert_close(
            model.predict_action(**inputs | {"attention_mask": None}, unnorm_key=unnorm_key), torch.tensor(action)
        )


def test_batched_prediction_equals_one_by_one(
    fused: Any, reference: dict[str, Tensor], golden: Path, meta: Any
) -> None:
    model, processor = fused
    cases = [case for case in meta["variants"]["fused"]["predict"] if case["unnorm_key"] == "toy_libero"]
    images = [Image.open(golden / meta["images"][case["image"]]) for case in cases]
    inputs = processor([case["prompt"] for case in cases], images, padding=True)
    actions = model.predict_action(**inputs, unnorm_key="toy_libero")
    assert_close(actions, torch.stack([reference[f"{case['key']}/toy_libero/action"] for case in cases]))


def test_eager_attention_gives_the_same_actions(golden: Path, reference: dict[str, Tensor]) -> None:
    model = OpenVLAForActionPrediction.from_pretrained(golden / "tiny-openvla-fused", attn_implementation="eager")
    inputs = {name: reference[f"infer/p0_i0/{name}"] for name in INPUTS[:3]}
    assert_close(model.predict_action(**inputs, unnorm_key="toy_libero"), reference["infer/p0_i0/toy_libero/action"])


def test_processor_equals_the_original(fused: Any, reference: dict[str, Tensor], golden: Path, meta: Any) -> None:
    _, processor = fused
    for case in meta["variants"]["fused"]["predict"]:
        inputs = processor(case["prompt"], Image.open(golden / meta["images"][case["image"]]))
        assert torch.equal(inputs["pixel_values"], reference[f"{case['key']}/pixel_values"])
        assert torch.equal(inputs["input_ids"], reference[f"{case['key']}/input_ids"])


def test_image_pipeline_is_bit_identical(golden: Path) -> None:
    for name, pixels in load_file(golden / "image_processing_224.safetensors").items():
        strategy, _, image = name.split("/")
        processor = OpenVLAImageProcessor(
            use_fused_vision_backbone=True,
            image_resize_strategy=strategy,
            input_sizes=[(3, 224, 224)] * 2,
            interpolations=["bicubic"] * 2,
            means=[(0.485, 0.456, 0.406), (0.5, 0.5, 0.5)],
            stds=[(0.229, 0.224, 0.225), (0.5, 0.5, 0.5)],
        )
        got = processor(Image.open(golden / f"{image}.png"), return_tensors="pt")["pixel_values"]
        assert torch.equal(got, pixels), name


def test_tokeniser_and_action_tokens(fused: Any, golden: Path, meta: dict[str, Any]) -> None:
    model, processor = fused
    for row in meta["tokenization"]:
        assert processor.tokenizer(row["text"])["input_ids"] == row["ids"]
        assert processor.tokenizer(row["text"], add_special_tokens=False)["input_ids"] == row["ids_no_special"]
        assert processor.tokenizer.decode(row["ids"], skip_special_tokens=True) == row["decoded"]
    tokenizer = ActionTokenizer(processor.tokenizer)
    assert tokenizer.action_token_begin_idx == model.config.action_token_begin_id == 31743
    assert [tokenizer(action) for action in meta["actions"]] == meta["action_strings"]
    assert tokenizer(np.array(meta["actions"])) == meta["action_strings"]
    table = load_file(golden / "action_tokenizer.safetensors")
    assert torch.equal(torch.tensor(tokenizer.encode(table["actions"].numpy())), table["token_ids"])
    assert torch.equal(model.bins.encode_tensor(table["actions"]), table["token_ids"])
    for ids, actions in (("token_ids", "decoded"), ("all_ids", "all_decoded")):
        assert_close(tokenizer.decode_token_ids_to_actions(table[ids].numpy()), table[actions])
        assert_close(model.bins.decode_tensor(table[ids]), table[actions])


@pytest.mark.filterwarnings("ignore:The PEFT config's:UserWarning", "ignore:`is_gradient_checkpointing`:FutureWarning")
def test_peft_adapter_equals_the_original(fused: Any, golden: Path, reference: dict[str, Tensor]) -> None:
    model, _ = fused
    folder = golden / "tiny-openvla-fused" / "lora_adapter"
    lora = load_file(golden / "golden_lora.safetensors")
    head = model.language_model.lm_head.weight.detach().clone()
    adapted = get_peft_model(model, LoraConfig.from_pretrained(folder)).eval()
    # The file also holds a copy of the base's lm_head, which must not replace the base's own.
    state = {
        name: value
        for name, value in load_file(folder / "adapter_model.safetensors").items()
        if ".base_layer." not in name
    }
    assert not set_peft_model_state_dict(adapted, state).unexpected_keys
    inputs = {name: reference[f"train/{name}"] for name in INPUTS}
    mask = reference["train/multimodal_attention_mask"].bool()
    with torch.no_grad():
        output = adapted(**inputs, output_hidden_states=True)
        with adapted.disable_adapter():
            disabled = adapted(**inputs)
    assert_close(output.loss, lora["lora/loss"][0])
    assert_close(output.projector_features, lora["lora/projector_features"])
    assert_close(output.hidden_states[-1][mask], lora["lora/hidden_states.last"][mask])
    assert_close(output.logits[..., 31744:32000][mask], lora["lora/logits_action_ids"][mask])
    assert_close(disabled.logits[..., 31744:32000][mask], lora["lora_disabled/logits_action_ids"][mask])
    assert torch.equal(adapted.get_base_model().language_model.lm_head.base_layer.weight, head)


@pytest.mark.parametrize("proprio", [0, 8])
@pytest.mark.parametrize("head", ["discrete", "l1"])
def test_parallel_decoding_equals_the_original(golden: Path, head: str, proprio: int) -> None:
    reference = load_file(golden / "golden_oft.safetensors")
    model, _ = load_openvla(
        golden / "tiny-openvla-oft", decoding="parallel", action_head=head, proprio_dim=proprio, use_film=False
    )
    key = f"train/n1_proprio{int(proprio > 0)}"
    full = {name: reference[f"{key}/{name}"] for name in INPUTS}
    extra = {"proprio": reference[f"{key}/proprio"]} if proprio else {}
    slots = full["labels"] > 31743
    length = slots.int().argmax(1)  # prompts with '▁'
    position = torch.arange(int(length.max()))[None]
    prompts = {
        "pixel_values": full["pixel_values"],
        "actions": reference[f"{key}/actions"],
        "attention_mask": (position < length[:, None]).long(),
        "input_ids": full["input_ids"][:, : int(length.max())],
    }
    bare = prompts | {"attention_mask": (position < length[:, None] - 1).long()}  # without '▁'
    with torch.no_grad():
        output = model(**full, **extra, output_hidden_states=True)
        others = [model(**inputs, **extra, output_hidden_states=True) for inputs in (prompts, bare)]
    mask = output.token_roles
    valid = torch.cat(
        [full["attention_mask"][:, :1], mask.vision.new_ones(2, 16 + (proprio > 0)), full["attention_mask"][:, 1:]], 1
    ).bool()
    assert_close(output.loss, reference[f"{key}/loss_ce"][0])
    assert_close(output.hidden_states[-1][valid], reference[f"{key}/last_hidden"][valid])
    for result in (output, *others):
        hidden = result.hidden_states[-1]
        actions = torch.stack([row[role] for row, role in zip(hidden, result.token_roles.action, strict=True)])
        assert_close(actions, reference[f"{key}/action_hidden_states"])
        if head == "l1":
            assert_close(result.predicted_actions, reference[f"{key}/pred_actions"])
    for result in others:
        assert_close(result.loss, reference[f"{key}/{'l1' if head == 'l1' else 'loss_ce'}"][0])
        assert (result.logits is None) == (head == "l1")
    infer = f"infer/n1_proprio{int(proprio > 0)}"
    if f"{infer}/{head}/action" in reference:
        inputs = {name: reference[f"{infer}/{name}"] for name in INPUTS[:3]}
        state = {"proprio": reference["proprio_norm"].numpy()} if proprio else {}
        action = model.predict_action(**inputs, **state, unnorm_key="toy_libero")
        assert_close(action, reference[f"{infer}/{head}/action"])


@pytest.mark.parametrize("proprio", [0, 8])
def test_parallel_decoding_equals_the_original_in_double_precision(
    golden: Path, double: dict[str, Tensor], proprio: int
) -> None:
    reference = load_file(golden / "golden_oft.safetensors")
    key = f"n1_proprio{int(proprio > 0)}"
    inputs = {name: reference[f"train/{key}/{name}"] for name in INPUTS}
    inputs["pixel_values"] = inputs["pixel_values"].double()
    if proprio:
        inputs["proprio"] = reference[f"train/{key}/proprio"].double()
    actions = reference[f"train/{key}/actions"].double()
    mask = inputs["attention_mask"]
    for head in ("l1", "discrete"):
        model, _ = load_openvla(
            golden / "tiny-openvla-oft", decoding="parallel", action_head=head, proprio_dim=proprio, use_film=False
        )
        model.double()
        with torch.no_grad(), compute_in_double(model, modeling_llama):
            output = model(**inputs, actions=actions, output_hidden_states=True)
        hidden = output.hidden_states[-1]
        valid = torch.cat([mask[:, :1], mask.new_ones(2, hidden.shape[1] - mask.shape[1]), mask[:, 1:]], 1).bool()
        slots = torch.stack([row[role] for row, role in zip(hidden, output.token_roles.action, strict=True)])
        assert_equal_in_double(hidden[valid], double[f"oft/{key}/last_hidden"])
        assert_equal_in_double(slots, double[f"oft/{key}/action_hidden_states"])
        if head == "l1":
            assert_equal_in_double(output.predicted_actions, double[f"oft/{key}/pred_actions"])
        assert_equal_in_double(output.loss, double[f"oft/{key}/{'l1' if head == 'l1' else 'loss_ce'}"])


def test_oft_folder_says_what_it_holds(golden: Path) -> None:
    config = OpenVLAForActionPrediction.from_pretrained(golden / "tiny-openvla-oft").config
    assert (config.decoding, config.action_head, config.proprio_dim, config.use_film) == ("parallel", "l1", 8, True)


@pytest.mark.parametrize("folder", ["tiny-openvla-fused", "tiny-openvla-oft"])
@pytest.mark.parametrize("shard", ["1GB", "2MB"])
def test_save_and_load_is_bit_identical(golden: Path, tmp_path: Path, folder: str, shard: str) -> None:
    model, processor = load_openvla(golden / folder)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    processor.save_pretrained(tmp_path)
    again, processor_again = load_openvla(tmp_path)
    state = model.state_dict()
    assert again.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())
    assert again.norm_stats == model.norm_stats
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
    image = Image.open(golden / "image1.png")
    prompt = "In: What action should the robot take to Ünïcode?\nOut:"
    for name, value in processor(prompt, image).items():
        assert torch.equal(processor_again(prompt, image)[name], value)


def test_black_and_white_frames_differ(golden: Path) -> None:
    for folder in ("tiny-openvla-fused", "tiny-openvla-oft"):
        model, processor = load_openvla(golden / folder)
        assert_policy_sees_image(model, processor)
        model.projector.fc3.weight.data.zero_()
        with pytest.raises(RuntimeError, match="does not see its image"):
            assert_policy_sees_image(model, processor)

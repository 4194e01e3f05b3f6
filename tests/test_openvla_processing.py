"""Prompts, images and action tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from infovla_peft.models.openvla import ActionTokenizer, OpenVLAImageProcessor, build_prompt
from infovla_peft.models.openvla.tiny import build_tiny_tokenizer

INSTRUCTIONS = ["open the middle drawer of the cabinet", "turn on the stove"]
TOKENIZER = build_tiny_tokenizer(INSTRUCTIONS)


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=40))
def test_tiny_tokeniser_writes_any_text(text: str) -> None:
    for special in ("<unk>", "<s>", "</s>", "<PAD>"):
        text = text.replace(special, "")
    text = "".join(character for character in text if not 0xE000 <= ord(character) < 0xE100)
    ids = TOKENIZER(text)["input_ids"]
    assert ids[0] == TOKENIZER.bos_token_id
    assert max(ids) < 512
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == text


def test_tiny_tokeniser_has_openvlas_layout() -> None:
    assert (TOKENIZER.vocab_size, TOKENIZER.pad_token_id, TOKENIZER.bos_token_id, TOKENIZER.eos_token_id) == (
        768,
        768,
        1,
        2,
    )
    assert len(TOKENIZER(build_prompt(INSTRUCTIONS[1]))["input_ids"]) <= 18
    assert TOKENIZER.get_vocab() == build_tiny_tokenizer(list(reversed(INSTRUCTIONS))).get_vocab()
    tokenizer = ActionTokenizer(TOKENIZER)
    action = [-1.0, -0.5, 0.0, 0.3, 1.0]
    assert TOKENIZER(tokenizer(action), add_special_tokens=False)["input_ids"] == tokenizer.encode(action).tolist()
    assert tokenizer([action, action]) == [tokenizer(action)] * 2
    assert (tokenizer.vocab_size, tokenizer.action_token_begin_idx) == (256, 511)


@given(st.lists(st.floats(-2, 2), min_size=1, max_size=20))
def test_actions_survive_their_tokens(values: list[float]) -> None:
    tokenizer = ActionTokenizer(TOKENIZER)
    ids = tokenizer.encode(values)
    assert ids.min() >= 512
    assert ids.max() <= 767
    assert np.array_equal(tokenizer.bins.encode_tensor(torch.tensor(values, dtype=torch.float64)).numpy(), ids)
    width = 2 / 255
    error = np.abs(tokenizer.decode_token_ids_to_actions(ids) - np.clip(values, -1, 1))
    assert error.max() <= width / 2 + 1e-12
    assert np.array_equal(tokenizer.encode(tokenizer.decode_token_ids_to_actions(ids))[ids > 512], ids[ids > 512])


def processor(strategy: str = "resize-naive", fused: bool = True, **changes: Any) -> OpenVLAImageProcessor:
    towers = 2 if fused else 1
    fields: dict[str, Any] = {
        "use_fused_vision_backbone": fused,
        "image_resize_strategy": strategy,
        "input_sizes": [(3, 28, 28)] * towers,
        "means": [(0.485, 0.456, 0.406), (0.5, 0.5, 0.5)][-towers:],
        "stds": [(0.229, 0.224, 0.225), (0.5, 0.5, 0.5)][-towers:],
    }
    return OpenVLAImageProcessor(**fields | changes)


@pytest.mark.parametrize("strategy", ["resize-naive", "resize-crop", "letterbox"])
@pytest.mark.parametrize("size", [(28, 28), (40, 30), (31, 64), (10, 30)])
def test_image_shapes_and_values(strategy: str, size: tuple[int, int]) -> None:
    pixels = processor(strategy)(Image.new("RGB", size, (255, 0, 128)), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 6, 28, 28)
    assert pixels.dtype == torch.float32
    centre = torch.tensor([1.0, 0.0, 128 / 255])
    torch.testing.assert_close(pixels[0, 3:, 14, 14], (centre - 0.5) / 0.5)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(pixels[0, :3, 14, 14], (centre - mean) / std)


def test_letterbox_fills_with_the_mean_of_the_last_backbone() -> None:
    pixels = processor("letterbox")(Image.new("RGB", (56, 28), (255, 255, 255)), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels[0, 3:, 0, 0], torch.full((3,), (127 / 255 - 0.5) / 0.5))


def test_arrays_pil_images_and_several_cameras() -> None:
    images = np.random.default_rng(0).integers(0, 256, (4, 28, 28, 3), dtype=np.uint8)
    run = processor()
    single = run(images[0], return_tensors="pt")["pixel_values"]
    assert torch.equal(single, run(Image.fromarray(images[0]), return_tensors="pt")["pixel_values"])
    assert torch.equal(single[0], run.apply_transform(images[0]))
    assert torch.equal(single[0], run.apply_transform(torch.from_numpy(images[0])))
    assert isinstance(run(images[0])["pixel_values"], np.ndarray)
    batch = run(list(images), return_tensors="pt")["pixel_values"]
    cameras = run([[images[0], images[1]], [images[2], images[3]]], return_tensors="pt")["pixel_values"]
    assert torch.equal(cameras, torch.stack([torch.cat([batch[0], batch[1]]), torch.cat([batch[2], batch[3]])]))
    for wrong, message in (
        (images[0].astype(np.float32), "uint8 array"),
        (torch.zeros(28, 28, 3, dtype=torch.bfloat16), r"uint8 array .*, got torch\.bfloat16 \(28, 28, 3\)"),
        (np.zeros((0, 0, 3), np.uint8), r"at least one pixel, got uint8 \(0, 0, 3\)"),
        (Image.new("RGB", (0, 0)), "at least one pixel"),
        (Image.new("F", (28, 28)), "mode 'F' holds no bytes"),
        (Image.new("I;16", (28, 28)), "mode 'I;16' holds no bytes; scale it"),
        ([[images[0]], [images[1], images[2]]], "same number"),
    ):
        with pytest.raises(ValueError, match=message):
            run(wrong)


def test_saved_numbers_are_used_as_they_are() -> None:
    saved = processor().to_dict()
    saved["tvf_normalize_params"][1]["mean"] = [0.25, 0.25, 0.25]
    saved.pop("image_processor_type")
    pixels = OpenVLAImageProcessor(**saved)(np.zeros((28, 28, 3), np.uint8), return_tensors="pt")["pixel_values"]
    assert pixels[0, 3].unique().tolist() == [-0.5]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_resize_strategy": "squash"}, "choose one of"),
        ({"input_sizes": [(3, 28, 30)] * 2}, "only squares"),
        ({"interpolations": ["magic"] * 2}, "filter 'magic'"),
    ],
)
def test_bad_image_processors_name_the_problem(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        processor(**fields) if "image_resize_strategy" not in fields else processor(fields["image_resize_strategy"])

"""Frames → samples → tensors: chunks, images, prompts, labels."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from toy_demonstrations import TASKS, toy_demonstrations

from infovla_peft.data.chunks import ChunkDataset, concatenate
from infovla_peft.data.collator import IGNORE_INDEX, VLACollator
from infovla_peft.data.images import ImagePipeline, central_crop, random_shift
from infovla_peft.data.normalisation import Normaliser, compute_statistics
from infovla_peft.data.rows import DemonstrationError
from infovla_peft.inference import Policy
from infovla_peft.models.openvla import OpenVLAImageProcessor, build_prompt, build_tiny_openvla
from infovla_peft.models.openvla.action_tokenizer import ActionBins


def tiny(**options: Any) -> tuple[Any, Any]:
    shape = {"image_size": 32, "patch_size": 16, "vision_width": 16, "vision_depth": 2, "hidden_size": 16, "layers": 2}
    return build_tiny_openvla(instructions=list(TASKS.values()), heads=2, **{**shape, **options})


def normaliser(dataset: ChunkDataset) -> Normaliser:
    return Normaliser({"toy": compute_statistics(dataset.env_actions, dataset.states, dataset.num_episodes)})


@pytest.fixture(scope="module")
def processor() -> Any:
    return tiny()[1]


@pytest.fixture(scope="module")
def pipeline(processor: Any) -> ImagePipeline:
    return ImagePipeline(processor.image_processor)


@pytest.fixture(scope="module")
def dataset(pipeline: ImagePipeline) -> ChunkDataset:
    return ChunkDataset(toy_demonstrations(), pipeline, chunk=5)


def test_a_chunk_repeats_the_last_action_and_never_enters_the_next_episode(dataset: ChunkDataset) -> None:
    samples = dataset.__getitems__([0, 9, 11])  # episodes have 12 frames
    np.testing.assert_array_equal(samples.actions[0, :, :6], dataset.env_actions[0:5, :6])
    np.testing.assert_array_equal(samples.actions[1, :, :6], dataset.env_actions[[9, 10, 11, 11, 11], :6])
    np.testing.assert_array_equal(samples.actions[2, :, :6], dataset.env_actions[[11] * 5, :6])
    assert samples.actions[2, :, 6].tolist() == [0.0] * 5  # LIBERO's closed (+1) is the model's 0
    np.testing.assert_array_equal(samples.states, dataset.states[[0, 9, 11]])


@pytest.mark.parametrize("cached", [True, False])
def test_a_damaged_picture_is_named(pipeline: ImagePipeline, cached: bool) -> None:
    frames = toy_demonstrations()
    pictures = frames.cast_column("image", datasets.Image(decode=False))["image"][:]
    pictures[3] = {"bytes": pictures[3]["bytes"][:40], "path": None}
    broken = frames.remove_columns("image").add_column("image", pictures).cast_column("image", datasets.Image())
    with pytest.raises(DemonstrationError, match=r"cannot be decoded .*: record or copy them again"):
        ChunkDataset(broken, pipeline, cache_images=cached).__getitems__([2, 3])


def test_bookkeeping(dataset: ChunkDataset) -> None:
    assert dataset.tasks == list(TASKS)
    assert len(dataset) == 72
    assert dataset.num_episodes == 6
    assert dataset.episode.tolist() == [row // 12 for row in range(72)]
    assert dataset[30].instructions == ["turn on the stove"]
    assert len(concatenate(dataset[0], dataset.__getitems__([1, 2]))) == 3


def test_cached_and_decoded_images_are_the_same(dataset: ChunkDataset, pipeline: ImagePipeline) -> None:
    lazy = ChunkDataset(dataset.frames, pipeline, cache_images=False)
    rows = [3, 70, 3, 40]
    np.testing.assert_array_equal(lazy.__getitems__(rows).images, dataset.__getitems__(rows).images)
    np.testing.assert_array_equal(dataset[3].images[0, 0].transpose(1, 2, 0), np.asarray(dataset.frames[3]["image"]))


def test_every_batch_of_frames_is_cached_in_its_place(pipeline: ImagePipeline) -> None:
    frames = toy_demonstrations(["open_the_drawer"], episodes=1, frames=300)  # more than are decoded at once
    cached, lazy = ChunkDataset(frames, pipeline), ChunkDataset(frames, pipeline, cache_images=False)
    rows = np.array([0, 1, 255, 256, 299])
    assert np.array_equal(cached.__getitems__(rows).images, lazy.__getitems__(rows).images)


def test_a_large_set_is_decoded_batch_by_batch(
    dataset: ChunkDataset, pipeline: ImagePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = dataset.__getitems__(range(len(dataset))).images
    for limit, kept in ((decoded.nbytes, True), (decoded.nbytes - 1, False)):
        monkeypatch.setattr("infovla_peft.data.chunks.IMAGE_CACHE_LIMIT", limit)
        other = ChunkDataset(dataset.frames, pipeline, chunk=5)
        assert (other._images is not None) is kept
        np.testing.assert_array_equal(other.__getitems__(range(len(other))).images, decoded)


def test_columns_of_selected_rows_and_of_lists_of_any_length(dataset: ChunkDataset, pipeline: ImagePipeline) -> None:
    rows = [*range(36, 48), *range(12)]
    chosen = ChunkDataset(dataset.frames.select(rows), pipeline)
    np.testing.assert_array_equal(chosen.states, dataset.states[rows])
    np.testing.assert_array_equal(chosen.states[5], np.asarray(dataset.frames[41]["state"], np.float32))
    assert (chosen.tasks, chosen.task.tolist()) == ([dataset.tasks[1], dataset.tasks[0]], [0] * 12 + [1] * 12)
    features = dataset.frames.features.copy()
    features["action"] = datasets.List(datasets.Value("float64"))
    loose = dataset.frames.cast(features)
    np.testing.assert_array_equal(ChunkDataset(loose, pipeline).env_actions, dataset.env_actions)
    ragged = loose.map(lambda _, row: {"action": [0.5] * (6 if row == 3 else 7)}, with_indices=True)
    with pytest.raises(ValueError, match="actions or states have 7 or 6 numbers each"):
        ChunkDataset(ragged, pipeline)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("size", [32, 48])
@pytest.mark.parametrize("strategy", ["resize-naive", "resize-crop", "letterbox"])
def test_images_equal_the_image_processor_bit_for_bit(fused: bool, size: int, strategy: str) -> None:
    towers = 2 if fused else 1
    processor = OpenVLAImageProcessor(
        use_fused_vision_backbone=fused,
        image_resize_strategy=strategy,
        input_sizes=[(3, 32, 32)] * towers,
        means=[(0.485, 0.456, 0.406), (0.5, 0.5, 0.5)][:towers],
        stds=[(0.229, 0.224, 0.225), (0.5, 0.5, 0.5)][:towers],
    )
    pipeline = ImagePipeline(processor)
    frames = toy_demonstrations(["open_the_drawer"], size=size, cameras=("image", "wrist_image"))
    dataset = ChunkDataset(frames, pipeline, cameras=("image", "wrist_image"))
    ours = pipeline.normalise(torch.from_numpy(dataset.__getitems__([0, 5]).images))
    theirs = processor([[frames[row][name] for name in dataset.cameras] for row in (0, 5)], return_tensors="pt")
    assert torch.equal(ours, theirs["pixel_values"])


def test_the_central_crop_is_what_it_says(processor: Any) -> None:
    side = 32
    ramp = np.broadcast_to(np.linspace(0, 248, side).round().astype(np.uint8)[None, :, None], (side, side, 3)).copy()
    cropped = central_crop(ramp, side)
    places = np.linspace((1 - 0.9**0.5) / 2, (1 + 0.9**0.5) / 2, side) * (side - 1)
    # To uint8 as TensorFlow's `convert_image_dtype(..., saturate=True)` goes: a cast of 255.5 times the float.
    floats = np.interp(places, np.arange(side), ramp[0, :, 0]) / 255
    np.testing.assert_array_equal(cropped[5, :, 1], (floats * 255.5).astype(np.uint8))
    assert central_crop(np.full((side, side, 3), 255, np.uint8), side).min() == 255
    np.testing.assert_array_equal(central_crop(ramp.transpose(1, 0, 2), side), cropped.transpose(1, 0, 2))
    assert np.unique(central_crop(np.full((50, 40, 3), 77, np.uint8), side)).tolist() == [77]
    # Training shows the model what a policy shows it.
    seen: list[Any] = []
    image = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    model, own = tiny()
    policy = Policy(model, own, Normaliser(model.norm_stats), recipe={"center_crop": True})
    model.vision_backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    policy.act(image, "open the drawer", np.zeros(8))
    pipeline = ImagePipeline(own.image_processor, crop=True)
    trained = pipeline.normalise(torch.from_numpy(pipeline.resize([Image.fromarray(image)]))[:, None])
    torch.testing.assert_close(seen[0], trained, atol=1e-6, rtol=0)
    assert not torch.allclose(
        seen[0],
        ImagePipeline(own.image_processor).normalise(
            torch.from_numpy(ImagePipeline(own.image_processor).resize([Image.fromarray(image)]))[:, None]
        ),
        atol=0.1,
    )


def test_random_shift_equals_a_shift_sample_by_sample() -> None:
    images = torch.randint(0, 256, (4, 2, 3, 6, 7), dtype=torch.uint8)
    shifts = torch.tensor([[0, 0], [2, -1], [-3, 3], [6, 7]])
    moved = random_shift(images, shifts)
    for sample, (down, right) in enumerate(shifts.tolist()):
        for row in range(6):
            for column in range(7):
                source = images[sample, :, :, min(max(row - down, 0), 5), min(max(column - right, 0), 6)]
                assert torch.equal(moved[sample, :, :, row, column], source)


def test_a_batch_for_parallel_decoding(dataset: ChunkDataset) -> None:
    model, processor = tiny(chunk=5)
    statistics = normaliser(dataset)
    collator = VLACollator(processor, statistics, model.config)
    batch = next(iter(DataLoader(dataset, batch_size=40, collate_fn=collator)))
    assert set(batch) == {"input_ids", "attention_mask", "pixel_values", "proprio", "actions"}
    assert batch["pixel_values"].shape == (40, 3, 32, 32)
    assert (batch["actions"].shape, batch["actions"].dtype) == ((40, 5, 7), torch.float32)
    np.testing.assert_allclose(batch["proprio"], statistics.normalise_proprio(dataset.states[:40]))
    for row in (0, 39):  # two instructions of different length
        expected = processor.tokenizer(build_prompt(dataset[row].instructions[0]))["input_ids"]
        assert batch["input_ids"][row][batch["attention_mask"][row].bool()].tolist() == expected
    assert model(**batch).loss.isfinite()


def test_a_batch_for_autoregressive_decoding(dataset: ChunkDataset) -> None:
    model, processor = tiny()
    config = model.config
    config.decoding, config.action_head, config.proprio_dim = "autoregressive", "discrete", 0
    config.empty_token_id = 7
    batch = VLACollator(processor, normaliser(dataset), config)(dataset.__getitems__([0, 30]))
    assert set(batch) == {"input_ids", "attention_mask", "pixel_values", "labels"}
    action = normaliser(dataset).normalise_actions(dataset[30].actions)[0, 0]
    answer = [*ActionBins(config.action_vocab_size).encode(action).tolist(), config.text_config.eos_token_id]
    prompt = processor.tokenizer(build_prompt(dataset[30].instructions[0]))["input_ids"]
    length = int(batch["attention_mask"][1].sum())
    assert batch["input_ids"][1, :length].tolist() == [*prompt, 7, *answer]
    assert batch["labels"][1, :length].tolist() == [IGNORE_INDEX] * (len(prompt) + 1) + answer
    assert (batch["labels"][1, length:] == IGNORE_INDEX).all()


def test_augmentation_is_applied_to_the_samples_it_is_meant_for(dataset: ChunkDataset) -> None:
    from dataclasses import replace

    model, processor = tiny(chunk=5)
    collator = VLACollator(processor, normaliser(dataset), model.config)
    plain = dataset.__getitems__([0, 1])
    noise = np.zeros((2, 8), dtype=np.float32)
    noise[0] = 0.5
    batch, moved = collator(plain), collator(replace(plain, shifts=np.array([[3, 1], [0, 0]]), proprio_noise=noise))
    assert torch.equal(moved["pixel_values"][0, :, 3:, 1:], batch["pixel_values"][0, :, :-3, :-1])
    assert torch.equal(moved["pixel_values"][1], batch["pixel_values"][1])
    assert torch.allclose(moved["proprio"][0], batch["proprio"][0] + 0.5)
    assert torch.equal(moved["proprio"][1], batch["proprio"][1])


def broken(**columns: Any) -> datasets.Dataset:
    frames = toy_demonstrations(["open_the_drawer"], frames=4)
    table = {**frames[:], **columns}
    return datasets.Dataset.from_dict(table, features=frames.features)


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (toy_demonstrations(["open_the_drawer"]).remove_columns("state"), "lack state"),
        (toy_demonstrations(["open_the_drawer"]).select([]), "no demonstrations"),
        (broken(frame_index=[0, 2, 1, 3, 0, 1, 2, 3]), "not in order"),
        (broken(episode_index=[0, 0, 1, 1, 0, 0, 1, 1], frame_index=[0, 1] * 4), "not in order"),
        (broken(state=[[float("nan")] * 8] * 8), "NaN or infinite"),
    ],
)
def test_unusable_demonstrations(pipeline: ImagePipeline, frames: datasets.Dataset, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChunkDataset(frames, pipeline)


def test_statistics_of_another_robot(dataset: ChunkDataset) -> None:
    model, processor = tiny(action_dim=6)
    with pytest.raises(ValueError, match=r"action has 6 numbers, the statistics of 'toy' have 7"):
        VLACollator(processor, normaliser(dataset), model.config)

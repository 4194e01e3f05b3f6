"""One policy on a task's probe frames: frames of demonstrations that are not in the replay memory."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .adapters import base_model
from .data.chunks import ChunkDataset, Samples
from .data.collator import VLACollator
from .data.demonstrations import CAMERA_COLUMNS, load_demonstrations
from .features import FeatureTap, extract_features
from .inference import Policy
from .memory import ReplayMemory
from .models.openvla import build_prompt
from .policy import chunk_length
from .representation import affinity_maps, swap_change
from .results import TaskEntry

PROBE_DEMONSTRATIONS = 2
FEWEST = 4
"""Frames; CKA without bias is not defined for less."""


@dataclass(frozen=True)
class Probe:
    """Frames of one task on which every stage is looked at.

    Attributes:
        task: the task.
        samples: K frames, see `data.chunks.Samples`.
        episodes: numbers of the demonstrations they come from.
    """

    task: TaskEntry
    samples: Samples
    episodes: list[int]


def choose_episodes(
    recorded: Sequence[int], remembered: Sequence[int], count: int = PROBE_DEMONSTRATIONS
) -> list[int]:
    """The first `count` demonstrations that are not in the memory; fewer where there are no more.

    >>> choose_episodes([0, 1, 2, 3], remembered=[1])
    [0, 2]
    """
    return [episode for episode in sorted(set(recorded)) if episode not in set(remembered)][:count]


def spread_rows(available: int, wanted: int) -> NDArray[np.int64]:
    """Numbers of `wanted` rows, evenly spaced over `available`, first and last included; all if there are fewer.

    >>> spread_rows(9, 3).tolist(), spread_rows(2, 3).tolist()
    ([0, 4, 8], [0, 1])
    """
    return np.linspace(0, available - 1, min(wanted, available)).round().astype(np.int64)


def probe_frames(
    task: TaskEntry,
    policy: Policy,
    source: str | os.PathLike[str],
    memory: ReplayMemory,
    *,
    frames: int,
    episodes: int | None,
    **options: Any,
) -> Probe:
    """Evenly spaced frames of demonstrations of one task that are not in the memory.

    Args:
        policy: says how large the images are, whether cropped, which cameras are seen and how long a chunk is.
        source, options: of the demonstrations, as for `load_demonstrations`.
        frames: K, how many are wanted.
        episodes: how many demonstrations of the task the run used; None: all that are there.

    Raises:
        ValueError: too few demonstrations or frames.
    """
    recorded = load_demonstrations(os.fspath(source), [task.name], episodes=episodes, **options)
    number = np.array(recorded["episode_index"])
    kept: list[int] = []
    if memory.frames is not None:
        names, numbers = memory.frames["task"], memory.frames["episode_index"]
        kept = [number for name, number in zip(names, numbers, strict=True) if name == task.name]
    chosen = choose_episodes(number.tolist(), kept)
    if not chosen:
        raise ValueError(
            f"all {len(set(number.tolist()))} demonstrations of {task.name!r} are in the replay memory, and an "
            "analysis needs others; record more (--demonstrations) or remember fewer (--memory_trajectories)"
        )
    config = base_model(policy.model).config
    dataset = ChunkDataset(
        recorded.select(np.flatnonzero(np.isin(number, chosen))),
        VLACollator(policy.processor, policy.normaliser, config, crop=policy.crop).pipeline,
        chunk=chunk_length(config),
        cameras=[CAMERA_COLUMNS[camera] for camera in policy.cameras],
        cache_images=False,
    )
    rows = spread_rows(len(dataset), frames)
    if len(rows) < FEWEST:
        raise ValueError(f"an analysis needs at least {FEWEST} frames per task, got {len(rows)} of {task.name!r}")
    samples = dataset.__getitems__(rows)
    # As results.json has it: the text that the rollouts are told.
    return Probe(task, replace(samples, instructions=[task.instruction] * len(rows)), chosen)


def instruction_words(tokenizer: Any, instruction: str) -> slice:
    """Which of the prompt's tokens are the instruction's own, as columns of `Features.language`.

    The rest is the same in every prompt: what two prompts begin and end with.
    """
    ids, other = (list(tokenizer(build_prompt(text))["input_ids"]) for text in (instruction, _OTHER_TEXT))
    first, last = _common(ids, other), _common(ids[::-1], other[::-1])
    return slice(first - 1, len(ids) - last - 1)  # without BOS


_OTHER_TEXT = "0 9"


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    return next((k for k, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


class Findings(NamedTuple):
    """What one policy makes of the probe frames of one task.

    Attributes:
        action: (K, D) float32, pooled action features.
        maps: (K, Nv) float32, affinity maps.
        change: instruction -> mean absolute change of the normalised actions when it is said instead.
        error: mean absolute difference of the normalised actions to the recorded ones.
    """

    action: Tensor
    maps: Tensor
    change: Mapping[str, float]
    error: float


def look_at(
    policy: Policy,
    probe: Probe,
    others: Sequence[str],
    *,
    tap_layer: int = -1,
    temperature: float = 0.1,
    batch_size: int = 16,
) -> Findings:
    """Run a policy on the probe frames of a task, told the truth and told other instructions.

    Args:
        others: instructions to swap in.
        tap_layer: as in training.
        temperature: of the affinity maps.
    """
    model, samples = base_model(policy.model), probe.samples
    collator = VLACollator(policy.processor, policy.normaliser, model.config)
    device, dtype = policy.model.device, policy.model.dtype
    words = instruction_words(policy.processor.tokenizer, probe.task.instruction)
    action, maps = [], []
    with torch.inference_mode():
        for start in range(0, len(samples), batch_size):
            batch = {
                name: tensor.to(device, dtype if tensor.is_floating_point() else None)
                for name, tensor in collator(_rows(samples, slice(start, start + batch_size))).items()
            }
            with FeatureTap(model, tap_layer) as tap:
                roles = policy.model(**batch, return_logits=False).token_roles
            features = extract_features(tap.hidden, roles)
            mask = torch.zeros_like(features.language_mask)
            mask[:, words] = True
            action.append(features.action.float().cpu())
            maps.append(affinity_maps(features, mask, temperature=temperature).float().cpu())
    own = _chunks(policy, samples, probe.task.instruction, batch_size)
    change = {other: float(swap_change(own, _chunks(policy, samples, other, batch_size)[None])) for other in others}
    recorded = torch.from_numpy(policy.normaliser.normalise_actions(samples.actions))
    return Findings(torch.cat(action), torch.cat(maps), change, float((own - recorded).abs().mean()))


def _chunks(policy: Policy, samples: Samples, instruction: str, batch_size: int) -> Tensor:
    """Normalised actions (K, T, A) for all frames under one instruction, clipped as recorded ones are."""
    chunks = []
    crop, policy.crop = policy.crop, False  # the samples are cropped already
    try:
        for start in range(0, len(samples), batch_size):
            rows = slice(start, start + batch_size)
            images = [list(images.transpose(0, 2, 3, 1)) for images in samples.images[rows]]
            chunks.append(policy.act_batch(images, [instruction] * len(images), list(samples.states[rows])))
    finally:
        policy.crop = crop
    return torch.from_numpy(policy.normaliser.normalise_actions(np.concatenate(chunks).astype(np.float32)))


def _rows(samples: Samples, rows: slice) -> Samples:
    return replace(
        samples,
        images=samples.images[rows],
        states=samples.states[rows],
        actions=samples.actions[rows],
        instructions=samples.instructions[rows],
    )

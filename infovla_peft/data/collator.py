"""Samples → the tensors a model of the OpenVLA family is trained on, vectorised over the batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..models.openvla import OpenVLAConfig, build_prompt
from ..models.openvla.action_tokenizer import ActionBins
from ..models.openvla.sequence import IGNORE_INDEX
from .chunks import Samples
from .images import ImagePipeline, random_shift
from .normalisation import Normaliser


class VLACollator:
    """Shift and normalise images, normalise actions and proprioception, tokenise prompts (each instruction once).

    Parallel decoding (OpenVLA-OFT) gives prompts and `actions` (B, T, A); autoregressive decoding gives whole
    sequences and `labels`, the next action's tokens and the end of sequence, as OpenVLA was trained.

    Args:
        processor: the model's `OpenVLAProcessor`.
        normaliser: frozen statistics, those of the base.
        config: the model's configuration; says how it decodes and whether it reads proprioception.
        crop: show the model the central crop of each image, see `images.central_crop`.

    Raises:
        ValueError: the model's action or proprioception has another size than the statistics.
    """

    def __init__(self, processor: Any, normaliser: Normaliser, config: OpenVLAConfig, *, crop: bool = False) -> None:
        for what, needed, given in (
            ("action", config.action_dim, normaliser.action_dim),
            ("proprioception", config.proprio_dim, normaliser.proprio_dim if config.proprio_dim else 0),
        ):
            if needed != given:
                raise ValueError(
                    f"the model's {what} has {needed} numbers, the statistics of {normaliser.key!r} have {given}; "
                    "choose another unnorm_key or base model"
                )
        self.normaliser, self.config = normaliser, config
        self.pipeline = ImagePipeline(processor.image_processor, crop=crop)
        self._tokenizer = processor.tokenizer
        self._prompts: dict[str, list[int]] = {}
        self._bins = ActionBins(config.action_vocab_size, config.n_action_bins)
        self._parallel = config.decoding == "parallel"

    def __call__(self, samples: Samples) -> dict[str, Any]:
        """Tensors on the CPU, ready for `model(**batch)`.

        Returns:
            input_ids, attention_mask (B, L), padded on the right; pixel_values (B, channels, side, side); proprio
            (B, P) where the model reads it; actions (B, T, A) or labels (B, L). Where samples are replayed, also
            `replay`, their `ReplayRows`, which the trainer takes out.
        """
        batch = self._tensors(samples)
        return batch if samples.replay is None else {**batch, "replay": samples.replay}

    def observations(self, samples: Samples) -> dict[str, Tensor]:
        """What `predict_action` takes: the same without the actions."""
        return {**self._seen(samples), **self._pad([self._prompt(each) for each in samples.instructions])}

    def _seen(self, samples: Samples) -> dict[str, Tensor]:
        images = torch.from_numpy(samples.images)
        if samples.shifts is not None:
            images = random_shift(images, torch.from_numpy(samples.shifts))
        batch = {"pixel_values": self.pipeline.normalise(images)}
        if self.config.proprio_dim:
            batch["proprio"] = torch.from_numpy(self._proprio(samples))
        return batch

    def _tensors(self, samples: Samples) -> dict[str, Tensor]:
        batch = self._seen(samples)
        actions = self.normaliser.normalise_actions(samples.actions)
        prompts = [self._prompt(instruction) for instruction in samples.instructions]
        if self._parallel:
            return {**batch, **self._pad(prompts), "actions": torch.from_numpy(actions)}
        answers = [self._answer(action) for action in actions[:, 0]]
        batch |= self._pad([prompt + answer for prompt, answer in zip(prompts, answers, strict=True)])
        labels = [[IGNORE_INDEX] * len(prompt) + answer for prompt, answer in zip(prompts, answers, strict=True)]
        return {**batch, "labels": self._pad(labels, IGNORE_INDEX)["input_ids"]}

    def _proprio(self, samples: Samples) -> NDArray[np.float32]:
        normalised = self.normaliser.normalise_proprio(samples.states)
        return normalised if samples.proprio_noise is None else normalised + samples.proprio_noise

    def _prompt(self, instruction: str) -> list[int]:
        if instruction not in self._prompts:
            ids = list(self._tokenizer(build_prompt(instruction))["input_ids"])
            # In the text "Out: <action>" the tokeniser puts '▁' between both; parallel decoding adds it by itself.
            empty = None if self._parallel else self.config.empty_token_id
            self._prompts[instruction] = ids if empty is None or ids[-1] == empty else [*ids, empty]
        return self._prompts[instruction]

    def _answer(self, action: NDArray[np.float32]) -> list[int]:
        return [*self._bins.encode(action).tolist(), int(self.config.text_config.eos_token_id)]

    def _pad(self, rows: list[list[int]], value: int | None = None) -> dict[str, Tensor]:
        lengths = np.array([len(row) for row in rows])
        mask = np.arange(lengths.max()) < lengths[:, None]  # (B, L)
        ids = np.full(mask.shape, self.config.pad_token_id if value is None else value, dtype=np.int64)
        ids[mask] = np.concatenate([np.asarray(row, dtype=np.int64) for row in rows])
        return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask.astype(np.int64))}

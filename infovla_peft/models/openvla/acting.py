"""Acting: from prompts and images to un-normalised robot actions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from .action_tokenizer import ActionBins
from .configuration_openvla import OpenVLAConfig
from .decoding import TokenSteps, action_logits, new_cache
from .sequence import TextSequence, append_tokens, check_batch, insert_after_bos, multimodal_mask


class ActingModel(PreTrainedModel):  # type: ignore[no-untyped-call]
    """`predict_action` and the statistics it needs, for `OpenVLAForActionPrediction`."""

    config: OpenVLAConfig
    bins: ActionBins
    language_model: Any
    projector: Any
    vision_backbone: Any

    @torch.no_grad()
    def predict_action(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        unnorm_key: str | None = None,
        do_sample: bool = False,
        proprio: Tensor | NDArray[Any] | None = None,
        temperature: float = 1.0,
    ) -> NDArray[Any]:
        """Un-normalised actions of a batch of prompts.

        Args:
            input_ids: (batch, length) prompts ending in "Out:", padded on the right; '▁' is appended where missing.
            attention_mask: (batch, length); None where nothing is padded.
            pixel_values: (batch, images * channels, height, width), normalised.
            unnorm_key: data set whose statistics un-normalise; may be left out if there is one alone.
            do_sample: draw action tokens at `temperature` instead of taking the likeliest (autoregressive).
            proprio: (batch, proprio_dim), **normalised**, as in OpenVLA-OFT.
            temperature: of `do_sample`, from 0 (the likeliest).

        Returns:
            Autoregressive: (dim,) for a batch of one, as the original, else (batch, dim). Parallel: (chunk, dim) or
            (batch, chunk, dim). Only action tokens are chosen from, and always `dim` of them. The original
            chooses from the whole vocabulary: where another token is the likeliest it gives the outermost bin, and
            after an early end-of-sequence token it reads prompt ids as actions.

        Raises:
            ValueError: an unknown data set, a temperature that is none, or inputs that `forward` refuses.
        """
        if do_sample and not 0 <= temperature < math.inf:
            raise ValueError(f"`temperature` must be at least 0, and finite, got {temperature}.")
        statistics = self.get_action_stats(unnorm_key)
        if self.config.decoding == "parallel":
            if proprio is not None and not isinstance(proprio, Tensor):
                proprio = torch.as_tensor(np.asarray(proprio, dtype=np.float32))
            output = self(input_ids, attention_mask, pixel_values, proprio=proprio)
            normalized: NDArray[Any] = output.predicted_actions.float().cpu().numpy()
            if self.config.action_head == "discrete":
                token_ids = output.action_logits.argmax(-1).cpu().numpy() + self.config.action_token_begin_id + 1
                normalized = self.bins.decode(token_ids).reshape(normalized.shape)  # in double precision
        else:
            if proprio is not None:
                raise ValueError("`proprio` needs a model with `decoding='parallel'`; leave it out")
            dim = len(statistics["q01"])
            ids = self._decode_tokens(input_ids, attention_mask, pixel_values, dim, temperature if do_sample else 0.0)
            normalized = self.bins.decode(ids.cpu().numpy())
        actions = unnormalize_actions(normalized, statistics, self.config)
        return actions[0] if len(actions) == 1 else actions

    def _decode_tokens(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        pixel_values: Tensor | None,
        count: int,
        temperature: float,
    ) -> Tensor:
        """(batch, count) action tokens after the prompts, with a key-value cache; temperature 0: the likeliest."""
        prompt = append_tokens(input_ids, attention_mask, empty_id=self.config.empty_token_id, slots=0, stop_id=None)
        cache = new_cache(self.config)
        hidden = self._forward_prompt(prompt, pixel_values, cache).last_hidden_state
        patches = hidden.shape[1] - prompt.input_ids.shape[1]
        position = (prompt.prompt_length + patches)[:, None]  # of the next token; padding is not counted
        last = (position - 1)[..., None].expand(-1, -1, hidden.shape[-1])
        mask = multimodal_mask(prompt.attention_mask, patches)
        steps = position + torch.arange(count - 1, device=position.device)
        advance = TokenSteps(self.language_model.model, cache, mask, steps, hidden.dtype)
        hidden = hidden.gather(1, last)  # (batch, 1, hidden)
        ids: list[Tensor] = []
        for step in range(count):
            logits = action_logits(self.language_model.lm_head, hidden[:, -1], self.config).float()  # (batch, bins)
            if temperature > 0:
                chosen = torch.multinomial((logits / temperature).softmax(-1), 1)
            else:
                chosen = logits.argmax(-1, keepdim=True)
            ids.append(chosen + (self.config.action_token_begin_id + 1))
            if step < count - 1:
                hidden = advance(ids[-1], step)
        return torch.cat(ids, dim=1)

    def _forward_prompt(self, prompt: TextSequence, pixel_values: Tensor | None, cache: DynamicCache) -> Any:
        embeddings = self.get_input_embeddings()(prompt.input_ids)
        patches = 0
        if pixel_values is not None:
            check_batch(pixel_values, prompt.input_ids)
            features = self.projector(self.vision_backbone(pixel_values))
            embeddings, patches = insert_after_bos(embeddings, features), features.shape[1]
        mask = multimodal_mask(prompt.attention_mask, patches)
        return self.language_model.model(None, mask, None, cache, inputs_embeds=embeddings, use_cache=True)

    @property
    def norm_stats(self) -> dict[str, Any]:
        """Statistics per data set, as in `dataset_statistics.json`."""
        return self.config.norm_stats or {}

    def get_action_dim(self, unnorm_key: str | None = None) -> int:
        """Numbers of one action of a data set."""
        return len(self.get_action_stats(unnorm_key)["q01"])

    def get_action_stats(self, unnorm_key: str | None = None) -> dict[str, Any]:
        """Action statistics of a data set; LIBERO's keys may carry the suffix `_no_noops`.

        Raises:
            ValueError: the key is unknown, or missing although there are several data sets.
        """
        known = self.norm_stats
        names = ", ".join(known) or "none; save `dataset_statistics.json` beside the weights"
        if unnorm_key is None:
            if len(known) != 1:
                raise ValueError(f"Pass `unnorm_key`, one of the data sets that the model knows: {names}.")
            return next(iter(known.values()))["action"]  # type: ignore[no-any-return]
        for key in (unnorm_key, f"{unnorm_key}_no_noops"):
            if key in known:
                return known[key]["action"]  # type: ignore[no-any-return]
        raise ValueError(f"`unnorm_key='{unnorm_key}'` is unknown; the model knows: {names}.")


def unnormalize_actions(normalized: NDArray[Any], statistics: dict[str, Any], config: OpenVLAConfig) -> NDArray[Any]:
    """[-1, 1] -> [low, high] per dimension where the mask is True; other dimensions stay as they are.

    Args:
        normalized: (…, dim).
        statistics: "q01" and "q99" ("min" and "max" with `action_normalization="bounds"`), each (dim,), and
            optionally "mask" (dim,) bool.
        config: OpenVLA-OFT (parallel decoding) adds 1e-8 to the range, OpenVLA does not.
    """
    low_name, high_name = ("min", "max") if config.action_normalization == "bounds" else ("q01", "q99")
    low, high = np.array(statistics[low_name]), np.array(statistics[high_name])
    if normalized.shape[-1] != len(low):
        raise ValueError(
            f"The statistics are of {len(low)}-dimensional actions, the model predicts {normalized.shape[-1]}."
        )
    mask = np.array(statistics.get("mask", np.ones_like(low, dtype=bool)))
    span = high - low + (1e-8 if config.decoding == "parallel" else 0.0)
    actions: NDArray[Any] = np.where(mask, 0.5 * (normalized + 1) * span + low, normalized)
    return actions

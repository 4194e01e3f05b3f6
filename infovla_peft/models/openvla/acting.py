"""Acting: from prompts and images to un-normalised robot actions."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel

from .action_tokenizer import ActionBins
from .configuration_openvla import OpenVLAConfig
from .sequence import TextSequence, append_tokens, check_batch, insert_after_bos, multimodal_mask


def new_cache(config: OpenVLAConfig) -> DynamicCache:
    """An empty cache. It is handed to the decoder by its place, the fourth: transformers 5.24 renamed the argument."""
    return DynamicCache(config=config.text_config)


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

        Returns:
            Autoregressive: (dim,) for a batch of one, as the original, else (batch, dim). Parallel: (chunk, dim) or
            (batch, chunk, dim). The original stops at an early end-of-sequence token and then reads prompt ids as
            actions; here `dim` tokens are always decoded.
        """
        statistics = self.get_action_stats(unnorm_key)
        if self.config.decoding == "parallel":
            if proprio is not None and not isinstance(proprio, Tensor):
                proprio = torch.as_tensor(np.asarray(proprio, dtype=np.float32))
            output = self(input_ids, attention_mask, pixel_values, proprio=proprio)
            normalized: NDArray[Any] = output.predicted_actions.float().cpu().numpy()
            if self.config.action_head == "discrete":
                token_ids = output.logits[:, :-1].argmax(-1).cpu().numpy()
                normalized = self.bins.decode(token_ids).reshape(normalized.shape)  # in double precision
        else:
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
        """(batch, count) token ids after the prompts, with a key-value cache; temperature 0 takes the likeliest."""
        prompt = append_tokens(input_ids, attention_mask, empty_id=self.config.empty_token_id, slots=0, stop_id=None)
        mask = prompt.attention_mask
        cache = new_cache(self.config)
        output = self._forward_prompt(prompt, pixel_values, cache)
        length = cache.get_seq_length()
        patches = length - prompt.input_ids.shape[1]
        position = (prompt.prompt_length + patches)[:, None]  # of the next token; padding is not counted
        mask = multimodal_mask(mask, patches)
        hidden = output.last_hidden_state.gather(
            1, (position - 1)[..., None].expand(-1, -1, int(self.config.text_config.hidden_size))
        )
        ids: list[Tensor] = []
        for step in range(count):
            logits = self.language_model.lm_head(hidden)[:, -1].float()
            if temperature > 0:
                token = torch.multinomial((logits / temperature).softmax(-1), 1)
            else:
                token = logits.argmax(-1, keepdim=True)
            ids.append(token)
            if step == count - 1:
                break
            if mask is not None:
                mask = F.pad(mask, (0, 1), value=True)
            hidden = self.language_model.model(token, mask, position + step, cache, use_cache=True).last_hidden_state
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

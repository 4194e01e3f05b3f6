"""Autoregressive decoding of action tokens: one pass over the prompts, then one short step per token.

What `generate` computes and nobody reads is left out: logits of the prompt, logits of tokens that are no actions, and
the preparations that the decoder makes anew for every call. What is left is the same arithmetic on the same numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import LlamaModel

from .configuration_openvla import OpenVLAConfig


def new_cache(config: OpenVLAConfig) -> DynamicCache:
    """An empty cache. It is handed to the decoder by its place, the fourth: transformers 5.24 renamed the argument."""
    return DynamicCache(config=config.text_config)


def action_logits(lm_head: nn.Module, hidden: Tensor, config: OpenVLAConfig) -> Tensor:
    """Logits (…, bins) of the action tokens from hidden states (…, hidden).

    The rows of other tokens are left out, unless `lm_head` is more than a matrix (an adapter, a quantised or sharded
    layer).
    """
    rows = slice(config.action_token_begin_id + 1, config.action_token_begin_id + 1 + config.n_action_bins)
    if isinstance(lm_head, nn.Linear) and _is_plain(lm_head, nn.Linear):
        return F.linear(hidden, lm_head.weight[rows], None if lm_head.bias is None else lm_head.bias[rows])
    logits: Tensor = lm_head(hidden)
    return logits[..., rows]


class TokenSteps:
    """Feeds one token per row after another to a decoder whose cache holds the prompts.

    Args:
        decoder: of the language model, without `lm_head`.
        cache: what the prompts left in it.
        mask: (batch, prompt) bool, False at padding; None where nothing is padded.
        positions: (batch, steps) of the tokens to come.
        dtype: of the hidden states.
    """

    def __init__(
        self, decoder: Any, cache: DynamicCache, mask: Tensor | None, positions: Tensor, dtype: torch.dtype
    ) -> None:
        self._decoder, self._cache, self._positions = decoder, cache, positions
        steps = positions.shape[1]
        self._length = cache.get_seq_length()
        self._mask = None if mask is None else F.pad(mask, (0, steps), value=True)  # (batch, prompt + steps)
        self._lean = steps > 0 and _can_be_lean(decoder, mask)
        if self._lean:
            like = torch.empty(0, dtype=dtype, device=positions.device)
            self._cos, self._sin = decoder.rotary_emb(like, positions)  # (batch, steps, head) each

    def __call__(self, token: Tensor, step: int) -> Tensor:
        """Hidden states (batch, 1, hidden) after token number `step` of each row (batch, 1)."""
        at = slice(step, step + 1)
        position = self._positions[:, at]
        mask = None if self._mask is None else self._mask[:, : self._length + step + 1]
        if not self._lean:
            output = self._decoder(token, mask, position, self._cache, use_cache=True)
            return output.last_hidden_state  # type: ignore[no-any-return]
        hidden: Tensor = self._decoder.embed_tokens(token)
        rotation = self._cos[:, at], self._sin[:, at]
        seen = None if mask is None else mask[:, None, None]  # (batch, heads, queries, keys)
        for layer in self._decoder.layers:
            hidden = layer(hidden, seen, position, self._cache, use_cache=True, position_embeddings=rotation)
        return self._decoder.norm(hidden)  # type: ignore[no-any-return]


def _can_be_lean(decoder: Any, mask: Tensor | None) -> bool:
    """Whether the layers can be called one after another: no wrapper or hook, and a mask as they want it."""
    if not _is_plain(decoder, LlamaModel) or decoder.rotary_emb.rope_type != "default":
        return False
    return mask is None or decoder.config._attn_implementation == "sdpa"


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether `module(…)` does what `kind.forward` says and nothing else."""
    return type(module) is kind and not (
        module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module) or module._compiled_call_impl
    )

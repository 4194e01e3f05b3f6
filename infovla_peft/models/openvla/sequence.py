"""The order of tokens that OpenVLA reads, and which position plays which role.

Text:        BOS, prompt …, [▁], action 1 … action K, EOS, padding …
Multimodal:  BOS, patches of image 1 …, [proprioception], prompt …, [▁], action 1 … action K, EOS, padding …

A position's hidden state predicts the *next* token: action k is read one position before its own. With parallel
decoding the K = chunk * action_dim action tokens are empty slots (their embeddings are zero) and all positions see
each other; the chunk is read in one pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...policy import TokenRoles
from .configuration_openvla import OpenVLAConfig

IGNORE_INDEX = -100


@dataclass(frozen=True)
class TextSequence:
    """A batch of token sequences, padded on the right.

    Attributes:
        input_ids: (batch, length).
        attention_mask: (batch, length) bool, or None where nothing is padded.
        slots: (batch, length) bool, action tokens whose embeddings are zero; None without parallel decoding.
        prompt_length: (batch,) number of tokens before the first action token.
        uniform: the prompt length where it is the same in each row, else None.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    slots: Tensor | None
    prompt_length: Tensor
    uniform: int | None


def true_lengths(input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, int, bool]:
    """Tokens per row (batch,), the largest of them, and whether all rows have as many.

    Raises:
        ValueError: the padding is not on the right.
    """
    batch, length = input_ids.shape
    if attention_mask is None:
        return torch.full((batch,), length, device=input_ids.device), length, True
    mask = attention_mask.bool()
    lengths = mask.sum(1)
    first_padding = mask.int().argmin(1) if length else lengths
    right_padded = torch.where(lengths == length, lengths, first_padding) == lengths
    ok, longest, shortest = torch.stack([right_padded.all().long(), lengths.max(), lengths.min()]).tolist()
    if not ok or shortest == 0:
        raise ValueError("OpenVLA needs padding on the right: set `tokenizer.padding_side = 'right'`.")
    return lengths, longest, longest == shortest


def append_tokens(
    input_ids: Tensor, attention_mask: Tensor | None, *, empty_id: int | None, slots: int, stop_id: int | None
) -> TextSequence:
    """Append [▁], `slots` empty action slots and a stop token after each row's true end.

    Args:
        input_ids: (batch, length) prompts, padded on the right.
        attention_mask: (batch, length), None where nothing is padded.
        empty_id: id of '▁', appended to rows that do not end in it; None appends nothing.
        slots: number of action slots, 0 for none.
        stop_id: id of the stop token after the slots; None appends nothing.
    """
    lengths, longest, uniform = true_lengths(input_ids, attention_mask)
    input_ids = input_ids[:, :longest]
    device = input_ids.device
    if empty_id is not None:
        last = input_ids.gather(1, (lengths - 1)[:, None]).squeeze(1)
        prompt_length = lengths + (last != empty_id)
        low, high = torch.stack([prompt_length.min(), prompt_length.max()]).tolist()
    else:
        prompt_length, low, high = lengths, 0 if not uniform else longest, longest
    suffix = slots + int(stop_id is not None)
    position = torch.arange(high + suffix, device=device)[None]  # (1, new length)
    relative = position - prompt_length[:, None]  # (batch, new length), 0 = first slot
    ids = torch.nn.functional.pad(input_ids, (0, high + suffix - longest))
    if empty_id is not None:
        ids = ids.masked_fill((relative == -1) & (position >= lengths[:, None]), empty_id)
    if stop_id is not None:
        ids = ids.masked_fill(relative == slots, stop_id)
    return TextSequence(
        input_ids=ids,
        attention_mask=None if low == high else relative < suffix,
        slots=(relative >= 0) & (relative < slots) if slots else None,
        prompt_length=prompt_length,
        uniform=high if low == high else None,
    )


def locate_slots(
    input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor, config: OpenVLAConfig
) -> TextSequence:
    """Find the action tokens of full training sequences by their labels (parallel decoding).

    Raises:
        ValueError: a row has another number of action labels than `num_actions_chunk * action_dim`.
    """
    _, longest, uniform = true_lengths(input_ids, attention_mask)
    slots = labels > config.action_token_begin_id
    prompt_length = slots.int().argmax(1)
    expected = config.num_actions_chunk * config.action_dim
    low, high, fewest, most = torch.stack(
        [prompt_length.min(), prompt_length.max(), slots.sum(1).min(), slots.sum(1).max()]
    ).tolist()
    if fewest != expected or most != expected:
        raise ValueError(
            f"Each row of `labels` must hold {expected} action tokens (num_actions_chunk {config.num_actions_chunk} x "
            f"action_dim {config.action_dim}), found {fewest} to {most}."
        )
    padded = not (uniform and longest == input_ids.shape[1])
    return TextSequence(
        input_ids=input_ids,
        attention_mask=attention_mask.bool() if attention_mask is not None and padded else None,
        slots=slots,
        prompt_length=prompt_length,
        uniform=high if low == high else None,
    )


def insert_after_bos(text: Tensor, inserted: Tensor) -> Tensor:
    """(batch, length, …) and (batch, extra, …) -> (batch, length + extra, …), the extra after the first position."""
    return torch.cat([text[:, :1], inserted, text[:, 1:]], dim=1)


def multimodal_mask(text: Tensor | None, extra: int) -> Tensor | None:
    """The mask of the text (batch, length) with `extra` positions, all True, after BOS."""
    if text is None or extra == 0:
        return text
    return insert_after_bos(text, text.new_ones(text.shape[0], extra))


def token_roles(
    prompt_length: Tensor, length: int, patches: int, has_proprio: bool, actions: Tensor | int
) -> TokenRoles:
    """Roles of a multimodal sequence of `length` positions.

    Args:
        prompt_length: (batch,) text tokens before the first action token, BOS included.
        length: positions of the multimodal sequence.
        patches: patch positions of all images, 0 for text only.
        has_proprio: one more position after the patches.
        actions: number of action tokens, or a mask (batch, length) of the positions that predict them.
    """
    extra = patches + has_proprio
    position = torch.arange(length, device=prompt_length.device)[None]
    first = (prompt_length + extra - 1)[:, None]  # (batch, 1) the position that predicts the first action token
    action = actions if isinstance(actions, Tensor) else (position >= first) & (position < first + actions)
    language = (position > extra) & (position < first)
    vision = ((position >= 1) & (position <= patches)).expand(len(prompt_length), -1)
    proprio = (position == patches + 1).expand(len(prompt_length), -1)
    return TokenRoles(
        vision, language, action, proprio if has_proprio else torch.zeros_like(proprio), vision_span=(1, 1 + patches)
    )


def check_batch(pixel_values: Tensor, input_ids: Tensor) -> None:
    """Raise a ValueError unless there are as many samples of images as prompts."""
    if len(pixel_values) != len(input_ids):
        raise ValueError(f"As many images as prompts are needed, got {len(pixel_values)} and {len(input_ids)}.")

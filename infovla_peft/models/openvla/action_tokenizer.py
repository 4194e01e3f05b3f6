"""Continuous actions as token ids and back: 256 bins over [-1, 1] on the last ids of the text vocabulary."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor


class ActionBins:
    """Bins of one action dimension, without a tokeniser.

    Args:
        vocab_size: text vocabulary without padding; bin 1 is id `vocab_size - 1`, the last bin the lowest id.
        n_bins: number of bin edges.
        min_action, max_action: range of a normalised action; values outside are clipped.
    """

    def __init__(self, vocab_size: int, n_bins: int = 256, min_action: float = -1, max_action: float = 1) -> None:
        self.vocab_size, self.n_bins = vocab_size, n_bins
        self.min_action, self.max_action = float(min_action), float(max_action)
        self.edges: NDArray[np.float64] = np.linspace(min_action, max_action, n_bins)
        self.centers: NDArray[np.float64] = (self.edges[:-1] + self.edges[1:]) / 2.0

    def encode(self, actions: ArrayLike) -> NDArray[np.int64]:
        """Actions of any shape -> token ids of the same shape."""
        clipped = np.clip(np.asarray(actions), self.min_action, self.max_action)
        ids: NDArray[np.int64] = self.vocab_size - np.digitize(clipped, self.edges)
        return ids

    def decode(self, token_ids: ArrayLike) -> NDArray[np.float64]:
        """Token ids of any shape -> bin centres; ids that are no action tokens give the nearest bin, as ever."""
        bins = np.clip(self.vocab_size - np.asarray(token_ids) - 1, 0, len(self.centers) - 1)
        actions: NDArray[np.float64] = self.centers[bins]
        return actions

    def encode_tensor(self, actions: Tensor) -> Tensor:
        """`encode` on the tensor's device."""
        edges = torch.as_tensor(self.edges, device=actions.device)
        clipped = actions.detach().double().clamp(self.min_action, self.max_action)
        return self.vocab_size - torch.bucketize(clipped, edges, right=True)

    def decode_tensor(self, token_ids: Tensor) -> Tensor:
        """`decode` on the tensor's device, float64."""
        centers = torch.as_tensor(self.centers, device=token_ids.device)
        return centers[(self.vocab_size - token_ids - 1).clamp(0, len(self.centers) - 1)]


class ActionTokenizer:
    """Turns actions into the text that a tokeniser maps to action tokens, and token ids into actions.

    Args:
        tokenizer: the language model's tokeniser; the action tokens are the last `bins` ids of its vocabulary.
        bins: number of bin edges per dimension.
        min_action, max_action: range of a normalised action; values outside are clipped.

    Example:
        >>> from infovla_peft.models.openvla import build_tiny_openvla
        >>> _, processor = build_tiny_openvla(instructions=["open the drawer"])
        >>> action_tokenizer = ActionTokenizer(processor.tokenizer)
        >>> ids = action_tokenizer.encode([-1.0, 0.0, 1.0])
        >>> action_tokenizer.decode_token_ids_to_actions(ids).round(2).tolist()
        [-1.0, 0.0, 1.0]
    """

    def __init__(self, tokenizer: Any, bins: int = 256, min_action: float = -1, max_action: float = 1) -> None:
        self.tokenizer = tokenizer
        self.bins = ActionBins(tokenizer.vocab_size, bins, min_action, max_action)

    def __call__(self, action: ArrayLike) -> str | list[str]:
        """The text of one action (dim,), or a list of texts of actions (batch, dim)."""
        ids = self.encode(action)
        if ids.ndim == 1:
            return str(self.tokenizer.decode(ids.tolist()))
        return list(self.tokenizer.batch_decode(ids.tolist()))

    def encode(self, action: ArrayLike) -> NDArray[np.int64]:
        """Actions of any shape -> token ids of the same shape."""
        return self.bins.encode(action)

    def decode_token_ids_to_actions(self, action_token_ids: ArrayLike) -> NDArray[np.float64]:
        """Token ids of any shape -> bin centres of the same shape."""
        return self.bins.decode(action_token_ids)

    @property
    def action_token_begin_idx(self) -> int:
        """Action tokens are the ids above this one."""
        return self.bins.vocab_size - (self.bins.n_bins + 1)

    @property
    def bin_centers(self) -> NDArray[np.float64]:
        return self.bins.centers

    @property
    def vocab_size(self) -> int:
        """Number of action tokens."""
        return self.bins.n_bins

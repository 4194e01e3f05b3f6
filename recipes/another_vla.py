"""A second architecture, in 60 lines: what `infovla_peft.policy` asks of a VLA, and nothing else.

It reads one image in patches, the instruction and the proprioception, mixes them in a transformer encoder, and answers
with a chunk of actions. Everything else (adapters, teacher, replay, RAC, CMI, the stream's trainer) works on it as on
OpenVLA. `tests/test_cookbook.py` trains it, and an adapter with it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from infovla_peft.models.openvla import OpenVLAConfig, OpenVLAOutput
from infovla_peft.policy import TokenRoles


class AnotherVLAConfig(OpenVLAConfig):
    """What the collator and the trainer read is inherited: action_dim, num_actions_chunk, proprio_dim, norm_stats."""

    model_type = "another_vla"


class AnotherVLA(PreTrainedModel):
    """[vision | language | proprioception | action queries] → encoder → one action per query."""

    config_class = AnotherVLAConfig
    patch, width = 8, 64

    def __init__(self, config: AnotherVLAConfig) -> None:
        super().__init__(config)
        self.see = nn.Conv2d(3, self.width, self.patch, self.patch)
        self.read = nn.Embedding(config.text_config.vocab_size, self.width)
        self.feel = nn.Linear(config.proprio_dim, self.width)
        self.queries = nn.Parameter(torch.randn(config.num_actions_chunk, self.width) / self.width**0.5)
        layers = [nn.TransformerEncoderLayer(self.width, 4, 128, 0.0, batch_first=True) for _ in range(2)]
        self.layers = nn.ModuleList(layers)
        self.act = nn.Linear(self.width, config.action_dim)
        self.post_init()

    def tap_module(self, layer: int) -> nn.Module:
        """Layers are counted as in `hidden_states`: 1 … L, or from the end."""
        return self.layers[layer - 1 if layer > 0 else layer]

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor, proprio: Tensor,
        actions: Tensor | None = None, return_logits: bool = False,
    ) -> OpenVLAOutput:  # fmt: skip
        """Say the loss, the answer, and which position of the sequence plays which role."""
        vision = self.see(pixel_values).flatten(2).transpose(1, 2)  # (batch, patches, width)
        language, state = self.read(input_ids), self.feel(proprio)[:, None]
        queries = self.queries.expand(len(input_ids), -1, -1)
        parts = (vision, language, state, queries)
        hidden, present = torch.cat(parts, 1), torch.ones(sum(part.shape[1] for part in parts), dtype=torch.bool)
        role = torch.repeat_interleave(torch.arange(4), torch.tensor([part.shape[1] for part in parts]))
        present, role = (each.to(hidden.device).repeat(len(hidden), 1) for each in (present, role))
        present[role == 1] = attention_mask.bool().flatten()
        for layer in self.layers:
            hidden = layer(hidden, src_key_padding_mask=~present)
        answer = self.act(hidden[:, -queries.shape[1] :])  # (batch, chunk, dim), normalised
        roles = TokenRoles(role == 0, (role == 1) & present, role == 3, role == 2)
        loss = None if actions is None else F.l1_loss(answer, actions)
        return OpenVLAOutput(loss=loss, predicted_actions=answer, token_roles=roles)

"""OpenVLA and OpenVLA-OFT as one native model, with the hub's own parameter names."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import ModelOutput

from ...files import write_json
from ...policy import TokenRoles
from .acting import ActingModel
from .action_head import L1ActionHead, ProprioProjector
from .action_tokenizer import ActionBins
from .checkpoint import (
    check_loaded,
    clear_loading_errors,
    complete_config,
    load_components,
    read_config,
    read_statistics,
)
from .configuration_openvla import OpenVLAConfig
from .decoding import new_cache
from .sequence import (
    IGNORE_INDEX,
    TextSequence,
    append_tokens,
    check_batch,
    insert_after_bos,
    locate_slots,
    multimodal_mask,
    token_roles,
    true_lengths,
)
from .vision import Projector, VisionBackbone, init_vision_weights


@dataclass
class OpenVLAOutput(ModelOutput):
    """What one forward pass gives; entries that were not asked for are None.

    Attributes:
        loss: scalar. Labels: mean cross-entropy over labels other than -100; targets `actions` with the L1 head: mean
            absolute error over all numbers of the chunks.
        logits: autoregressive, or parallel with labels: (batch, sequence, vocabulary); parallel with the discrete
            head and without labels: (batch, chunk * dim + 1, vocabulary) at the action positions and the one that
            predicts the stop token.
        predicted_actions: parallel decoding, (batch, chunk, dim), normalised.
        action_logits: heads that write tokens, with targets (or parallel, with logits): (batch, actions, bins), those
            of the action vocabulary at the positions that predict action tokens.
        hidden_states: embeddings and the output of each decoder layer, the last one after the final norm.
        projector_features: (batch, images * patches, hidden), the visual tokens of the language model.
        cache: with `use_cache=True`; also called `past_key_values`, its name before transformers 5.24.
        token_roles: role of each position of the multimodal sequence.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    predicted_actions: Tensor | None = None
    action_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    projector_features: Tensor | None = None
    cache: Any = None
    token_roles: TokenRoles | None = None

    @property
    def past_key_values(self) -> Any:
        return self.cache


class OpenVLAForActionPrediction(ActingModel):
    """A language model that reads image patches and an instruction and writes robot actions.

    One class for plain OpenVLA (`decoding="autoregressive"`) and OpenVLA-OFT (`decoding="parallel"`, with
    `action_head`, `proprio_projector` and FiLM as the configuration says).

    Example:
        >>> from infovla_peft.models.openvla import build_tiny_openvla
        >>> model, processor = build_tiny_openvla(instructions=["open the drawer"], image_size=32, proprio_dim=0)
        >>> import numpy as np
        >>> image = np.zeros((32, 32, 3), np.uint8)
        >>> inputs = processor("In: What action should the robot take to open the drawer?\\nOut:", image)
        >>> model.predict_action(**inputs).shape
        (8, 7)
    """

    config_class = OpenVLAConfig
    config: OpenVLAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["ViTBlock", "Projector"]  # type: ignore[misc]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values", "cache"]  # type: ignore[misc]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"rotary_emb\.inv_freq"]  # type: ignore[misc]

    def __init__(self, config: OpenVLAConfig) -> None:
        super().__init__(config)
        config.check()
        hidden_size = int(config.text_config.hidden_size)
        self.vision_backbone = VisionBackbone(config)
        self.projector = Projector(
            self.vision_backbone.embed_dim, hidden_size, fused=bool(config.use_fused_vision_backbone)
        )
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)  # type: ignore[no-untyped-call]
        if config.action_head == "l1":
            self.action_head = L1ActionHead(hidden_size, config.action_dim)
        if config.proprio_dim:
            self.proprio_projector = ProprioProjector(hidden_size, config.proprio_dim)
        self.bins = ActionBins(config.action_vocab_size, config.n_action_bins)
        self.post_init()  # type: ignore[no-untyped-call]

    # ---- what transformers asks for -------------------------------------------------------------------------------

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()  # type: ignore[no-any-return]

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()  # type: ignore[no-any-return]

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.set_output_embeddings(new_embeddings)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[no-untyped-call]
        init_vision_weights(module)
        if isinstance(module, L1ActionHead | ProprioProjector):
            for layer in module.modules():
                if isinstance(layer, nn.Linear):
                    layer.reset_parameters()  # OpenVLA-OFT starts these from torch's own initial values

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *model_args: Any,
        config: OpenVLAConfig | None = None,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load a checkpoint of OpenVLA, OpenVLA-OFT or this package, from a folder or the hub.

        The separate files of an OpenVLA-OFT folder (`action_head--*.pt` …) switch on what they hold;
        fields of the configuration given as arguments (for example `use_film=False`) have the last word. They are
        added to a `config` of plain OpenVLA too, as transformers' Auto classes give it, unless the folder's own says
        how it decodes; to load such a folder as plain OpenVLA, give `decoding="autoregressive"` and no `config`.
        `dataset_statistics.json` beside the weights replaces `config.norm_stats`.

        Raises:
            ValueError: the folder is no OpenVLA checkpoint, or lacks weights, or has weights the model does not know;
                the message names them.
            FileNotFoundError: the folder has no `config.json`.
        """
        path, images = os.fspath(pretrained_model_name_or_path), kwargs.get("images")
        if config is None:
            config, kwargs = read_config(path, kwargs)
        else:
            config = complete_config(config, path, kwargs)
        kwargs.pop("images", None)
        if images not in (None, config.num_images_in_input):
            raise ValueError(
                f"'{path}' reads {config.num_images_in_input} image(s), not {images}: leave `images` out (of a "
                "policy, `cameras`), or name as many."
            )
        kwargs.setdefault("use_safetensors", True)  # other formats may hold code
        statistics = read_statistics(path, kwargs)
        if statistics is not None:
            config.norm_stats = statistics
        load: Any = super().from_pretrained
        with clear_loading_errors(path):
            model, info = load(
                path, *model_args, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
        info["missing_keys"] = set(info["missing_keys"]) - load_components(model, path, info["missing_keys"], kwargs)
        check_loaded(path, info)
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:  # type: ignore[override]
        """Save weights, configuration and, beside them, `dataset_statistics.json`."""
        super().save_pretrained(save_directory, **kwargs)
        if self.config.norm_stats is not None and kwargs.get("is_main_process", True):
            write_json(os.path.join(save_directory, "dataset_statistics.json"), self.config.norm_stats)

    # ---- forward --------------------------------------------------------------------------------------------------

    def tap_module(self, layer: int) -> nn.Module:
        """The module whose output is `hidden_states[layer]`: 1 … L (L after the final norm), negative from the end."""
        decoder = self.language_model.model
        count = len(decoder.layers)
        index = layer + count + 1 if layer < 0 else layer
        if not 1 <= index <= count:
            raise ValueError(f"Layer {layer} cannot be tapped: choose 1 to {count}, or -{count} to -1.")
        return decoder.norm if index == count else decoder.layers[index - 1]  # type: ignore[no-any-return]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        proprio: Tensor | None = None,
        actions: Tensor | None = None,
        patch_features: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_logits: bool | None = None,
        return_dict: bool | None = None,
    ) -> OpenVLAOutput | tuple[Any, ...]:
        """Run the model once.

        Args:
            input_ids: (batch, length), padded on the right. Autoregressive: the whole sequence. Parallel: the prompt
                alone (the model appends '▁', empty action slots and the stop token), or, with `labels`, the whole
                training sequence of the original code.
            attention_mask: (batch, length), 0 at padding; None where nothing is padded.
            pixel_values: (batch, images * channels, height, width), normalised; None for text alone.
            labels: (batch, length), -100 where no loss is taken. They are shifted inside.
            proprio: (batch, proprio_dim), normalised; needed if the configuration has `proprio_dim`.
            actions: (batch, chunk, dim), normalised targets (parallel decoding).
            patch_features: (R, images * patches, vision width), what `vision_backbone` has made of the images of the
                last R samples; `pixel_values` then holds those of the others alone. Not with FiLM.
            past_key_values, use_cache: the cache of autoregressive decoding.
            output_hidden_states: also give all hidden states.
            return_logits: False computes no logits beyond those that the loss needs; True gives them; None (default)
                too, except with the L1 head without labels, where nobody needs them.
            return_dict: False gives a tuple.

        Raises:
            ValueError: inputs that do not fit each other or the configuration.
        """
        if self.config.decoding == "parallel":
            output = self._forward_parallel(
                input_ids, attention_mask, pixel_values, labels, proprio, actions, output_hidden_states, return_logits,
                patch_features,
            )  # fmt: skip
        else:
            if actions is not None or proprio is not None:
                raise ValueError("`actions` and `proprio` need a model with `decoding='parallel'`.")
            output = self._forward_autoregressive(
                input_ids,
                attention_mask,
                pixel_values,
                labels,
                past_key_values,
                bool(use_cache) and not self.training,
                output_hidden_states,
                return_logits,
                patch_features,
            )
        return output.to_tuple() if return_dict is False else output

    def _forward_autoregressive(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        pixel_values: Tensor | None,
        labels: Tensor | None,
        past_key_values: Any,
        use_cache: bool,
        output_hidden_states: bool | None,
        return_logits: bool | None,
        patch_features: Tensor | None = None,
    ) -> OpenVLAOutput:
        embeddings = self.get_input_embeddings()(input_ids)
        features = None
        patches = 0
        if pixel_values is not None:
            features = self._visual_tokens(input_ids, pixel_values, patch_features)
            patches = features.shape[1]
            embeddings = insert_after_bos(embeddings, features)
        cache = new_cache(self.config) if use_cache and past_key_values is None else past_key_values
        decoded = self.language_model.model(
            *(None, multimodal_mask(attention_mask, patches), None, cache),  # by place: transformers 5.24 renamed it
            inputs_embeds=embeddings,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
        )
        hidden = decoded.last_hidden_state
        if labels is not None and patches:
            labels = insert_after_bos(labels, labels.new_full((len(labels), patches), IGNORE_INDEX))
        logits = None if return_logits is False else self.language_model.lm_head(hidden)
        roles = None
        if past_key_values is None:
            lengths, _, _ = true_lengths(input_ids, attention_mask)
            if labels is None:
                roles = token_roles(lengths, hidden.shape[1], patches, False, 1)
            else:
                predicts = F.pad(labels[:, 1:] > self.config.action_token_begin_id, (0, 1))
                prompt = predicts.int().argmax(1) + 1 - patches
                roles = token_roles(prompt, hidden.shape[1], patches, False, predicts)
        loss, action_logits = (None, None) if labels is None else self.action_token_loss(hidden, labels, logits)
        return OpenVLAOutput(
            loss=loss,
            logits=logits,
            action_logits=action_logits,
            hidden_states=decoded.hidden_states,
            projector_features=features,
            cache=cache,
            token_roles=roles,
        )

    def action_token_loss(
        self, hidden: Tensor, labels: Tensor, logits: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Mean negative log-likelihood of labels (batch, sequence), each predicted one position before.

        Also the logits (batch, actions, bins) of action tokens, None where rows have unequal numbers of them.
        """
        targets = labels[:, 1:]
        predicted = targets != IGNORE_INDEX
        if logits is None:
            logits = self.language_model.lm_head(hidden[:, :-1][predicted])
        else:
            logits = logits[:, :-1][predicted]
        is_action = targets > self.config.action_token_begin_id
        per_row = is_action.sum(1)
        even = len(per_row) > 0 and bool((per_row == per_row[0]).all())
        actions = self._bins_of(logits[is_action[predicted]]) if even else None
        if actions is not None:
            actions = actions.view(len(labels), -1, actions.shape[-1])
        return F.cross_entropy(logits.float(), targets[predicted]), actions

    def _bins_of(self, logits: Tensor) -> Tensor:
        """(…, vocabulary) -> (…, bins): the action tokens alone."""
        first = self.config.action_token_begin_id + 1
        return logits[..., first : first + self.config.n_action_bins]

    def _forward_parallel(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        pixel_values: Tensor | None,
        labels: Tensor | None,
        proprio: Tensor | None,
        actions: Tensor | None,
        output_hidden_states: bool | None,
        return_logits: bool | None,
        patch_features: Tensor | None = None,
    ) -> OpenVLAOutput:
        config = self.config
        if pixel_values is None:
            raise ValueError("Parallel decoding needs `pixel_values`.")
        chunk = (config.num_actions_chunk, config.action_dim)
        if actions is not None and tuple(actions.shape[1:]) != chunk:  # one action would be broadcast
            raise ValueError(f"`actions` must be (batch, {chunk[0]}, {chunk[1]}), got {tuple(actions.shape)}.")
        slots = config.num_actions_chunk * config.action_dim
        if labels is not None:
            sequence = locate_slots(input_ids, attention_mask, labels, config)
        else:
            sequence = append_tokens(
                input_ids,
                attention_mask,
                empty_id=config.empty_token_id,
                slots=slots,
                stop_id=config.text_config.eos_token_id,
            )
        assert sequence.slots is not None
        text = self.get_input_embeddings()(sequence.input_ids)
        language = _mean_language(text, sequence, include_padding=labels is not None) if config.use_film else None
        features = self._visual_tokens(input_ids, pixel_values, patch_features, language)
        inserted = features
        if config.proprio_dim:
            inserted = torch.cat([features, self._proprio_token(proprio, features)], dim=1)
        elif proprio is not None:
            raise ValueError("`proprio` was given, but the configuration has `proprio_dim=0`.")
        extra = inserted.shape[1]
        embeddings = insert_after_bos(text.masked_fill(sequence.slots[..., None], 0), inserted)
        mask = multimodal_mask(sequence.attention_mask, extra)
        hidden, hidden_states = self._decode_bidirectional(embeddings, mask, output_hidden_states)

        first = extra - 1 + (sequence.prompt_length if sequence.uniform is None else sequence.uniform)
        loss = logits = predicted = action_logits = None
        if config.action_head == "l1":
            predicted = self.action_head(_take(hidden, first, slots))
            if actions is not None:
                loss = F.l1_loss(predicted.float(), actions.float())
        elif actions is not None or return_logits is not False:
            scores = self.language_model.lm_head(_take(hidden, first, slots + 1))  # (batch, slots + stop, vocabulary)
            predicted = (
                self.bins.decode_tensor(scores[:, :-1].argmax(-1)).float().view(len(scores), -1, config.action_dim)
            )
            logits = None if return_logits is False else scores
            action_logits = self._bins_of(scores[:, :-1])
            if actions is not None and labels is None:
                targets = F.pad(self.bins.encode_tensor(actions.flatten(1)), (0, 1), value=self._stop_id)
                loss = F.cross_entropy(scores.flatten(0, 1).float(), targets.flatten())
        if return_logits is not False and (labels is not None or (return_logits and logits is None)):
            logits = self.language_model.lm_head(hidden)
        if labels is not None and loss is None:
            labels = insert_after_bos(labels, labels.new_full((len(labels), extra), IGNORE_INDEX))
            loss, action_logits = self.action_token_loss(hidden, labels, logits)
        roles = token_roles(
            sequence.prompt_length, hidden.shape[1], features.shape[1], bool(config.proprio_dim), slots
        )
        return OpenVLAOutput(
            loss=loss,
            logits=logits,
            predicted_actions=predicted,
            action_logits=action_logits if config.action_head == "discrete" else None,
            hidden_states=hidden_states,
            projector_features=features,
            token_roles=roles,
        )

    def _visual_tokens(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        patch_features: Tensor | None,
        language: Tensor | None = None,
    ) -> Tensor:
        """(batch, images * patches, hidden), of images, and of `patch_features` after them."""
        if patch_features is None:
            check_batch(pixel_values, input_ids)
            return self.projector(self.vision_backbone(pixel_values, language))  # type: ignore[no-any-return]
        if language is not None:
            raise ValueError("`patch_features` cannot be given with FiLM, which lets the instruction change them.")
        patch_features = patch_features.to(self.vision_backbone.featurizer.pos_embed.dtype)
        seen = [self.vision_backbone(pixel_values)] if len(pixel_values) else []
        features = torch.cat([*seen, patch_features])
        check_batch(features, input_ids)
        return self.projector(features)  # type: ignore[no-any-return]

    @property
    def _stop_id(self) -> int:
        return int(self.config.text_config.eos_token_id)

    def _proprio_token(self, proprio: Tensor | None, features: Tensor) -> Tensor:
        if proprio is None:
            raise ValueError(f"This model needs `proprio`, normalised, (batch, {self.config.proprio_dim}).")
        # A copy, because matrix products round differently where memory is not aligned (tensors mapped from files).
        proprio = proprio.to(features.device, features.dtype, copy=True).reshape(len(features), -1)
        if proprio.shape[1] != self.config.proprio_dim:
            raise ValueError(f"`proprio` has {proprio.shape[1]} numbers per sample, not {self.config.proprio_dim}.")
        return self.proprio_projector(proprio)[:, None]  # type: ignore[no-any-return]

    def _decode_bidirectional(
        self, embeddings: Tensor, mask: Tensor | None, output_hidden_states: bool | None
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """Hidden states (batch, sequence, hidden) where every position sees every position that is no padding."""
        decoded = self.language_model.model(
            inputs_embeds=embeddings,
            attention_mask=create_bidirectional_mask(self.config.text_config, embeddings, mask),
            use_cache=False,
            output_hidden_states=output_hidden_states,
            is_causal=False,
        )
        return decoded.last_hidden_state, decoded.hidden_states


def _take(hidden: Tensor, first: Tensor | int, count: int) -> Tensor:
    """`count` positions of hidden (batch, sequence, dim) from `first` on, which is one number or one per row."""
    if isinstance(first, int):
        return hidden[:, first : first + count]
    index = first[:, None] + torch.arange(count, device=hidden.device)
    return hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))


def _mean_language(text: Tensor, sequence: TextSequence, *, include_padding: bool) -> Tensor:
    """Mean embedding (batch, dim) of all tokens but the action slots, for FiLM.

    The original's training code counts padding in. With its whole sequences that is done here too; prompts alone are
    averaged without padding, so that a row does not depend on the others of its batch.
    """
    assert sequence.slots is not None
    if include_padding or sequence.attention_mask is None:
        return text[~sequence.slots].view(len(text), -1, text.shape[-1]).mean(1)
    keep = sequence.attention_mask & ~sequence.slots
    return (text * keep[..., None]).sum(1) / keep.sum(1, keepdim=True)

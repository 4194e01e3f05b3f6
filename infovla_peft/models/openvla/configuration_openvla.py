"""Configuration of OpenVLA and OpenVLA-OFT, read from and written as the hub's `config.json`."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

DECODINGS = ("autoregressive", "parallel")
ACTION_HEADS = ("discrete", "l1")
ACTION_NORMALIZATIONS = ("bounds_q99", "bounds")

_DINOV2 = "vit_large_patch14_reg4_dinov2.lvd142m"
# vision_backbone_id -> (timm ids, activation overrides, image sizes), one entry of each per vision transformer.
VISION_BACKBONES: dict[str, tuple[list[str], list[str | None], list[int]]] = {
    "clip-vit-l": (["vit_large_patch14_clip_224.openai"], ["quick_gelu"], [224]),
    "clip-vit-l-336px": (["vit_large_patch14_clip_336.openai"], ["quick_gelu"], [336]),
    "dinov2-vit-l": ([_DINOV2], [None], [224]),
    "in1k-vit-l": (["vit_large_patch16_224.augreg_in21k_ft_in1k"], [None], [224]),
    "siglip-vit-so400m": (["vit_so400m_patch14_siglip_224"], [None], [224]),
    "siglip-vit-so400m-384px": (["vit_so400m_patch14_siglip_384"], [None], [384]),
    "dinoclip-vit-l-336px": ([_DINOV2, "vit_large_patch14_clip_336.openai"], [None, "quick_gelu"], [336, 336]),
    "dinosiglip-vit-so-224px": ([_DINOV2, "vit_so400m_patch14_siglip_224"], [None, None], [224, 224]),
    "dinosiglip-vit-so-384px": ([_DINOV2, "vit_so400m_patch14_siglip_384"], [None, None], [384, 384]),
}
LANGUAGE_BACKBONES = {
    "llama2-7b-pure": "meta-llama/Llama-2-7b-hf",
    "llama2-13b-pure": "meta-llama/Llama-2-13b-hf",
    "llama2-7b-chat": "meta-llama/Llama-2-7b-chat-hf",
    "llama2-13b-chat": "meta-llama/Llama-2-13b-chat-hf",
    "vicuna-v15-7b": "lmsys/vicuna-7b-v1.5",
    "vicuna-v15-13b": "lmsys/vicuna-13b-v1.5",
    "mistral-v0.1-7b-pure": "mistralai/Mistral-7B-v0.1",
    "mistral-v0.1-7b-instruct": "mistralai/Mistral-7B-Instruct-v0.1",
    "phi-2-3b": "microsoft/phi-2",
}


class OpenVLAConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """Everything that shapes an OpenVLA model.

    The first group holds the fields of the hub's `config.json`, the second what OpenVLA-OFT adds; the defaults of
    the second are plain OpenVLA. Unknown fields are kept as they are.

    Parameters that control the backbones:
        vision_backbone_id: one of `VISION_BACKBONES`; decides image sizes and shapes of the vision transformers.
        llm_backbone_id: one of `LANGUAGE_BACKBONES`.
        text_config: configuration of the language model (a dictionary or a config).
        image_sizes: side of the square input image in pixels, one per vision transformer.
        tiny_timm_kwargs: shapes of the vision transformers, one dictionary per transformer, in the words of timm's
            `VisionTransformer`; only for checkpoints that are smaller than the published ones.
        use_fused_vision_backbone: two vision transformers side by side, their patch features concatenated.

    Parameters that control the actions:
        norm_stats: statistics per data set, as in `dataset_statistics.json`.
        n_action_bins: bins of one action dimension, spread over the last `n_action_bins` ids of the text vocabulary.
        pad_to_multiple_of: rows that padding has added to the text vocabulary.
        acting: what a policy does beyond the model: {"prompt", "center_crop", "cameras"}; `load_policy`
            sets it, so that a checkpoint with a merged adapter acts as the adapter did.
        action_normalization: "bounds_q99" (1st to 99th percentile) or "bounds" (minimum to maximum; OFT on ALOHA).
        decoding: "autoregressive" (OpenVLA) or "parallel" (OpenVLA-OFT: bidirectional attention, one pass).
        action_head: "discrete" (256 bins through `lm_head`) or "l1" (regression, only with parallel decoding).
        num_actions_chunk: actions of one chunk (parallel decoding; LIBERO 8, ALOHA 25, Bridge 5).
        action_dim: numbers of one action (parallel decoding).
        proprio_dim: numbers of the proprioceptive state, 0 for none.
        num_images_in_input: images of one sample, concatenated on the channel axis.
        use_film: the vision transformers are modulated by the mean embedding of the instruction.
        empty_token_id: id of the token '▁' that the tokeniser puts between "Out:" and the first action token, None
            where the tokeniser has no such token. 29871 is Llama-2's.

    Raises:
        ValueError: a field has a value that no OpenVLA has.

    Example:
        >>> config = OpenVLAConfig(vision_backbone_id="dinosiglip-vit-so-224px", llm_backbone_id="llama2-7b-pure")
        >>> config.use_fused_vision_backbone, config.action_vocab_size
        (True, 31936)
    """

    model_type = "openvla"
    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama")
    }
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "past_key_values",
        "cache",
        "hidden_states",
        "attentions",
        "projector_features",
        "token_roles",
    ]

    vision_backbone_id: str = "siglip-vit-so400m"
    llm_backbone_id: str = "vicuna-v15-7b"
    arch_specifier: str = "no-align+gelu-mlp"
    use_fused_vision_backbone: bool | None = None
    image_resize_strategy: str = "letterbox"
    text_config: Any = None
    llm_max_length: int = 2048
    pad_token_id: int = 32000
    pad_to_multiple_of: int = 64
    output_projector_states: bool = False
    timm_model_ids: list[str] | None = None
    timm_override_act_layers: list[str | None] | None = None
    image_sizes: list[int] | None = None
    hf_llm_id: str | None = None
    tiny_timm_kwargs: list[dict[str, Any]] | None = None
    tie_word_embeddings: bool = False

    norm_stats: dict[str, Any] | None = None
    acting: dict[str, Any] | None = None
    n_action_bins: int = 256
    action_normalization: str = "bounds_q99"
    decoding: str = "autoregressive"
    action_head: str = "discrete"
    num_actions_chunk: int = 8
    action_dim: int = 7
    proprio_dim: int = 0
    num_images_in_input: int = 1
    use_film: bool = False
    empty_token_id: int | None = 29871

    def __post_init__(self, **kwargs: Any) -> None:
        # The classes named there are remote code; this package never runs it, so the entry must not be saved again.
        kwargs.pop("auto_map", None)
        _check_choice("vision_backbone_id", self.vision_backbone_id, VISION_BACKBONES)
        _check_choice("llm_backbone_id", self.llm_backbone_id, LANGUAGE_BACKBONES)
        timm_ids, activations, sizes = VISION_BACKBONES[self.vision_backbone_id]
        if self.use_fused_vision_backbone is None:
            self.use_fused_vision_backbone = len(timm_ids) == 2
        self.timm_model_ids = self.timm_model_ids or list(timm_ids)
        self.timm_override_act_layers = self.timm_override_act_layers or list(activations)
        self.image_sizes = self.image_sizes or list(sizes)
        self.hf_llm_id = self.hf_llm_id or LANGUAGE_BACKBONES[self.llm_backbone_id]
        if isinstance(self.text_config, dict) and "model_type" not in self.text_config:
            self.text_config = {**self.text_config, "model_type": self._language_model_type()}
        elif self.text_config is None:
            self.text_config = {"model_type": self._language_model_type()}
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
        self.check()

    def _language_model_type(self) -> str:
        return next((kind for kind in ("mistral", "phi") if self.llm_backbone_id.startswith(kind)), "llama")

    def check(self) -> None:
        """Raise a ValueError that names the first field whose value does not fit the others."""
        _check_choice("decoding", self.decoding, DECODINGS)
        _check_choice("action_head", self.action_head, ACTION_HEADS)
        _check_choice("action_normalization", self.action_normalization, ACTION_NORMALIZATIONS)
        if self.decoding == "autoregressive":
            for field, plain in (("action_head", "discrete"), ("proprio_dim", 0), ("use_film", False)):
                if getattr(self, field) != plain:
                    raise ValueError(
                        f"`{field}={getattr(self, field)!r}` needs `decoding='parallel'`: only OpenVLA-OFT has it."
                    )
        acting = {} if self.acting is None else self.acting
        if not isinstance(acting, dict) or not (
            isinstance(acting.get("prompt", ""), str)
            and acting.get("center_crop") in (None, True, False)
            and isinstance(cameras := acting.get("cameras", []), list)
            and all(isinstance(camera, str) for camera in cameras)
        ):
            raise ValueError(
                f"`acting` must hold prompt (a string), center_crop and cameras, got {self.acting!r:.80}; copy the "
                "checkpoint's config.json again."
            )
        for field in ("num_actions_chunk", "action_dim", "num_images_in_input"):
            if getattr(self, field) < 1:
                raise ValueError(f"`{field}` must be at least 1, got {getattr(self, field)}.")
        towers = 2 if self.use_fused_vision_backbone else 1
        for field in ("timm_model_ids", "timm_override_act_layers", "image_sizes", "tiny_timm_kwargs"):
            values = getattr(self, field)
            if values is not None and len(values) < towers:
                raise ValueError(f"`{field}` needs {towers} entries, one per vision transformer, got {values}.")

    @property
    def action_vocab_size(self) -> int:
        """Text vocabulary without its padding; the ids just below it are the action tokens."""
        return int(self.text_config.vocab_size) - self.pad_to_multiple_of

    @property
    def action_token_begin_id(self) -> int:
        """Action tokens are the ids above this one, as far as labels are concerned (31743 for Llama-2)."""
        return self.action_vocab_size - (self.n_action_bins + 1)


def _check_choice(field: str, value: object, choices: Any) -> None:
    if value not in choices:
        raise ValueError(f"`{field}={value!r}` is unknown; choose one of {', '.join(sorted(choices))}.")

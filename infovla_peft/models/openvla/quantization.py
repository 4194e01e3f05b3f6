"""QLoRA: the frozen base in 4 bits, so that 7 billion parameters take 4 GB; adapters stay in full precision."""

from __future__ import annotations

import importlib.util
from typing import Any, Literal

import torch
from torch import Tensor

Quantization = Literal["none", "nf4"]
NOT_QUANTIZED = ["lm_head", "action_head", "proprio_projector"]  # small, and every action goes through them


def quantization_config(quantization: Quantization) -> Any:
    """How transformers loads a base that is held in 4 bits, `transformers.BitsAndBytesConfig`; None for "none".

    NF4 with double quantisation (Dettmers et al., 2305.14314); products are computed in bfloat16 on a GPU, in float32
    on a CPU. `lm_head`, the action head and the proprioception's projector are not quantised.

    Raises:
        ValueError: another name.
        ImportError: bitsandbytes is not installed.
    """
    if quantization == "none":
        return None
    if quantization != "nf4":
        raise ValueError(f"quantization must be none or nf4, got {quantization!r:.40}")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError(
            "quantization='nf4' needs bitsandbytes, which is not installed: pip install 'infovla-peft[quantization]'"
        )
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if torch.cuda.is_available() else torch.float32,
        llm_int8_skip_modules=NOT_QUANTIZED,  # of 4 bits as well, in spite of its name
    )


def quantization_of(model: Any) -> Quantization:
    """How a loaded base is held."""
    return "nf4" if getattr(model, "is_loaded_in_4bit", False) else "none"


def logical_shape(tensor: Tensor) -> tuple[int, ...] | None:
    """The shape of a weight that is packed into 4 bits; None for any other tensor."""
    state = getattr(tensor, "quant_state", None)
    return None if state is None else tuple(state.shape)

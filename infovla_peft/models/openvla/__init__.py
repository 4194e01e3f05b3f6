"""OpenVLA and OpenVLA-OFT, native: the hub's parameter names, no remote code, no timm, no torchvision.

Importing this package registers the classes with transformers' Auto classes under the model type "openvla".
"""

from __future__ import annotations

import os
from typing import Any

from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor

from .action_tokenizer import ActionTokenizer
from .checkpoint import hub_arguments
from .configuration_openvla import OpenVLAConfig
from .modeling_openvla import OpenVLAForActionPrediction, OpenVLAOutput
from .processing_openvla import PROMPT, OpenVLAImageProcessor, OpenVLAProcessor, build_prompt
from .quantization import Quantization, quantization_config
from .sanity import assert_policy_sees_image
from .tiny import build_tiny_openvla

__all__ = [
    "PROMPT",
    "ActionTokenizer",
    "OpenVLAConfig",
    "OpenVLAForActionPrediction",
    "OpenVLAImageProcessor",
    "OpenVLAOutput",
    "OpenVLAProcessor",
    "assert_policy_sees_image",
    "build_prompt",
    "build_tiny_openvla",
    "load_openvla",
]

AutoConfig.register(OpenVLAConfig.model_type, OpenVLAConfig, exist_ok=True)
AutoModelForImageTextToText.register(OpenVLAConfig, OpenVLAForActionPrediction, exist_ok=True)
AutoImageProcessor.register(OpenVLAConfig, slow_image_processor_class=OpenVLAImageProcessor, exist_ok=True)
AutoProcessor.register(OpenVLAConfig, OpenVLAProcessor, exist_ok=True)  # type: ignore[no-untyped-call]


def load_openvla(
    path_or_id: str | os.PathLike[str],
    *,
    dtype: Any = None,
    device: Any = None,
    quantization: Quantization = "none",
    images: int | None = None,
    **kwargs: Any,
) -> tuple[OpenVLAForActionPrediction, OpenVLAProcessor]:
    """Load a checkpoint and its processor, ready to act (evaluation mode).

    Args:
        path_or_id: folder or hub id of OpenVLA, OpenVLA-OFT or a base that this package has trained.
        dtype: of the weights, None for the checkpoint's own.
        device: where the model goes, None for the CPU (quantised, for the GPU if there is one).
        quantization: nf4 = hold the weights in 4 bits (see `quantization_config`), for QLoRA.
        images: number of images that the model reads, where the checkpoint does not say it: a folder of the original
            OpenVLA-OFT, whose code is told at run time (2 for its LIBERO checkpoints). None is one, or what the
            checkpoint says.
        kwargs: fields of the configuration to change, and `subfolder`, and `revision`, `cache_dir`, `token` … of the
            hub.

    Raises:
        ValueError, FileNotFoundError: see `OpenVLAForActionPrediction.from_pretrained`; the checkpoint says that it
            reads another number of images.
        ImportError: bitsandbytes is needed and not installed.
    """
    if (held := quantization_config(quantization)) is not None:
        kwargs["quantization_config"] = held
    model = OpenVLAForActionPrediction.from_pretrained(
        path_or_id, **{"dtype": dtype} if dtype else {}, images=images, **kwargs
    )
    hub = hub_arguments(kwargs)
    hub |= {"revision": commit} if (commit := getattr(model.config, "_commit_hash", None)) else {}
    try:
        processor = OpenVLAProcessor.from_pretrained(path_or_id, **hub)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"'{path_or_id}' has no usable processor; it needs preprocessor_config.json and tokenizer.json. ({error})"
        ) from error
    return (model if device is None else model.to(device)).eval(), processor

"""Adapters and bases of other origin: plain PEFT files of OpenVLA's own recipe, and what is known of them.

Such an adapter is `adapter_config.json` and `adapter_model.safetensors`. Nothing in it says on which weights it was
trained, so whoever loads it answers for the base. Its file also carries the base's whole `lm_head` (keys with
`.base_layer.`), which is left out.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from peft import PeftModel
from safetensors import safe_open
from torch import nn

from .adapter_files import INFO, PEFT_CONFIG, AdapterError, AdapterInfo
from .adapters import read_adapter
from .fingerprints import digest_config, digest_weights
from .models.openvla.checkpoint import component_tensors
from .reading import read_json

_SUPPORTED = {"peft_type": "LORA", "megatron_config": None, "modules_to_save": None, "bias": "none"}


def read_reference_info(folder: str | os.PathLike[str]) -> AdapterInfo:
    """What a plain PEFT adapter says of itself: the name of its base.

    Raises:
        AdapterError: `adapter_config.json` is damaged, no LoRA as OpenVLA's recipe makes it, or of an adapter of this
            package whose `infovla.json` is missing.
    """
    file = Path(folder) / PEFT_CONFIG
    content = read_json(file, error=AdapterError, cure="copy the adapter again")
    if not isinstance(content, dict):
        raise AdapterError(f"{file} is damaged (it holds no object); copy the adapter again")
    base = content.get("base_model_name_or_path") or ""
    if str(base).startswith("."):  # this package names a base so that lies beside the adapter, the recipe none
        raise AdapterError(
            f"{file.with_name(INFO)} is missing: the adapter goes onto the base at {base!r}, and without that file it "
            "would be loaded unchecked. Copy the whole folder again; of a plain PEFT adapter, write the base's Hub id "
            f"into {PEFT_CONFIG}"
        )
    for name, expected in _SUPPORTED.items():
        if content.get(name, expected) != expected:
            raise AdapterError(f"{file}: {name} is {content[name]!r}; adapters of OpenVLA's recipe have {expected!r}")
    return AdapterInfo(
        base_model=str(base),
        base_fingerprint={},
        unnorm_key="",
        base_revision=content.get("revision"),
        stage=1,  # 0 is the base
    )


def load_reference_adapter(model: nn.Module, folder: str | os.PathLike[str], name: str) -> PeftModel:
    """Add a plain PEFT adapter to a base, and activate it. Which base it needs is not checked: the file does not say.

    Raises:
        FileNotFoundError, AdapterError: see `read_adapter_weights`, `read_reference_info`.
    """
    read_reference_info(folder)
    return read_adapter(model, Path(folder), name)


def fingerprint_of_files(
    location: str | os.PathLike[str], model: nn.Module, options: Mapping[str, Any]
) -> dict[str, str]:
    """`adapters.fingerprint` of a checkpoint as it lies on disk: what a model in 4 bits or in float16 no longer shows.

    Args:
        location: folder, or Hub id of a checkpoint.
        model: what was just loaded from it, without adapters. Its configuration and the names of its weights enter,
            no values.
        options: `revision`, `token`, `cache_dir` and `local_files_only` of the Hub.
    """
    names = ("revision", "token", "cache_dir", "local_files_only")
    hub = {name: options[name] for name in names if name in options}
    folder = Path(location) if Path(location).is_dir() else None
    patterns = ["*.safetensors", "*--*.pt"]
    folder = folder or Path(snapshot_download(os.fspath(location), allow_patterns=patterns, **hub))
    wanted = {name for name, _ in model.named_parameters()}
    whole = folder / "model.safetensors"
    files = [whole] if whole.is_file() else sorted(folder.glob("*.safetensors"))  # as transformers prefers it
    missing = wanted - set().union(*map(_names_in, files))
    # Loading, too, skips what the model has no place for.
    tensors = {name: value for name, value in component_tensors(str(folder), missing, {}).items() if name in wanted}
    for file in files:
        with safe_open(file, framework="pt") as stored:
            # What OpenVLA-OFT has in a file of its own replaces what lies here, as it does in the model.
            tensors |= {name: stored.get_tensor(name) for name in wanted.intersection(stored.keys()) - set(tensors)}
    return {"config": digest_config(model.config), "weights": digest_weights(tensors.items())}


def _names_in(file: Path) -> set[str]:
    with safe_open(file, framework="pt") as stored:
        return set(stored.keys())

"""Record `golden_double.safetensors`: what the original code computes in double precision on the golden checkpoints.

    pip install transformers==4.40.1 tokenizers==0.19.1 timm==0.9.16 "numpy<2" "torch<2.14"     # beside no other
    python tests/record_double.py openvla CLONE GOLDEN tests/golden_double.safetensors     # openvla/openvla @ c8f03f48
    python tests/record_double.py oft CLONE GOLDEN tests/golden_double.safetensors     # moojink/openvla-oft @ 213c5ff8

Nothing of the original is changed but the type it computes in (`double_precision`), the sizes of the two ViTs, which
timm knows by name alone, and, for OpenVLA-OFT, the attention's mask, which its fork of transformers makes
bidirectional. `--single` records single precision, to be compared with the golden set: it says that all this is right.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.machinery
import json
import sys
import types
from pathlib import Path
from typing import Any

import torch
from double_precision import compute_in_double
from safetensors.torch import load_file, save_file
from torch import Tensor

INPUTS = ("input_ids", "attention_mask", "pixel_values", "labels")
GRADIENTS = ("language_model.model.layers.0.self_attn.q_proj.weight", "projector.fc2.bias")


def stand_in_libraries() -> None:
    """torchvision's operators, which timm asks for by name, and diffusers, which the L1 head does without."""
    operators = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor boxes, Tensor scores, float threshold) -> Tensor")
    stand_in_libraries.operators = operators  # type: ignore[attr-defined]  # gone with its object, otherwise
    for name in ("diffusers", "diffusers.schedulers", "diffusers.schedulers.scheduling_ddim"):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        sys.modules[name] = module
    sys.modules["diffusers.schedulers.scheduling_ddim"].DDIMScheduler = object  # type: ignore[attr-defined]


def load_original(source: Path, checkpoint: Path, dtype: torch.dtype) -> Any:
    """The original's model with a checkpoint's weights; its packages' `__init__` want far more than the model does."""
    for name in ("prismatic", "prismatic.extern", "prismatic.extern.hf", "prismatic.training", "prismatic.vla"):
        package = types.ModuleType(name)
        package.__path__ = [str(source / name.replace(".", "/"))]
        sys.modules[name] = package
    sys.modules["prismatic.models"] = models = types.ModuleType("prismatic.models")
    models.__path__ = [str(source / "prismatic/models")]
    import timm
    from timm.models.vision_transformer import VisionTransformer

    config = json.loads((checkpoint / "config.json").read_text())
    sizes = dict(zip(config["timm_model_ids"], config.pop("tiny_timm_kwargs"), strict=True))

    def create_model(name: str, pretrained: bool, num_classes: int, img_size: int, act_layer: str | None) -> Any:
        del pretrained
        return VisionTransformer(
            **{"img_size": img_size, "num_classes": num_classes, "act_layer": act_layer} | sizes[name]
        )

    timm.create_model = create_model
    modeling = importlib.import_module("prismatic.extern.hf.modeling_prismatic")
    config.pop("model_type")
    configuration = modeling.OpenVLAConfig(**config)
    configuration._attn_implementation = "sdpa"
    model = modeling.OpenVLAForActionPrediction(configuration).eval()
    state: dict[str, Tensor] = {}
    for shard in sorted(checkpoint.glob("model-*.safetensors")):
        state |= load_file(shard)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert all("inv_freq" in name for name in missing), missing
    return model.to(dtype)


def record_openvla(model: Any, golden: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """Forward and backward on the golden set's training batch."""
    reference = load_file(golden / "golden_fused.safetensors")
    inputs = {name: reference[f"train/{name}"] for name in INPUTS}
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    output = model(**inputs, output_hidden_states=True, output_projector_features=True)
    output.loss.backward()
    mask = reference["train/multimodal_attention_mask"].bool()
    found = {
        "loss": output.loss,
        "projector_features": output.projector_features,
        "hidden": output.hidden_states[-1][mask],
        "logits_lse": output.logits.logsumexp(-1)[mask],
    }
    found |= {
        f"grad_norm.{name}": parameter.grad.norm()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    found |= {f"grad.{name}": model.get_parameter(name).grad for name in GRADIENTS}
    return {f"openvla/{name}": value.detach() for name, value in found.items()}


def record_oft(model: Any, golden: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """Parallel decoding of the golden set's training batch, without and with proprioception."""
    reference = load_file(golden / "golden_oft.safetensors")
    heads = importlib.import_module("prismatic.models.action_heads")
    projectors = importlib.import_module("prismatic.models.projectors")
    folder, width = golden / "tiny-openvla-oft", model.config.text_config.hidden_size

    def load(module: Any, name: str) -> Any:
        state = torch.load(folder / f"{name}--150000_checkpoint.pt", weights_only=True)
        module.load_state_dict({key.removeprefix("module."): value for key, value in state.items()})
        return module.eval().to(dtype)

    head = load(heads.L1RegressionActionHead(input_dim=width, hidden_dim=width), "action_head")
    projector = load(projectors.ProprioProjector(llm_dim=width, proprio_dim=8), "proprio_projector")
    found: dict[str, Tensor] = {}
    for key in ("n1_proprio0", "n1_proprio1"):
        inputs = {name: reference[f"train/{key}/{name}"] for name in INPUTS}
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
        extra = {}
        if key.endswith("1"):
            extra = {"proprio": reference[f"train/{key}/proprio"].to(dtype), "proprio_projector": projector}
        with torch.no_grad():
            output = model(**inputs, **extra, output_hidden_states=True, output_projector_features=True)
            last = output.hidden_states[-1]
            before = last.shape[1] - inputs["input_ids"].shape[1]  # vision and proprioception, after BOS
            slots = inputs["labels"][:, 1:] > 31743
            actions = torch.stack([row[before:-1][slot] for row, slot in zip(last, slots, strict=True)])
            predicted = head.predict_action(actions)
        truth = reference[f"train/{key}/actions"].to(dtype)
        mask = inputs["attention_mask"].bool()
        rows = [torch.cat((row[: before + 1], row[before + 1 :][m[1:]])) for row, m in zip(last, mask, strict=True)]
        found |= {
            f"{key}/loss_ce": output.loss,
            f"{key}/last_hidden": torch.cat(rows),
            f"{key}/action_hidden_states": actions,
            f"{key}/pred_actions": predicted,
            f"{key}/l1": (predicted - truth).abs().mean(),
        }
    return {f"oft/{name}": value for name, value in found.items()}


def attend_both_ways(self: Any, attention_mask: Tensor, inputs: Tensor, *_: Any) -> Tensor:
    """In place of `LlamaModel._update_causal_mask`: padding alone is hidden."""
    del self
    hidden = (attention_mask == 0)[:, None, None, :].expand(-1, 1, attention_mask.shape[1], -1)
    return torch.zeros(hidden.shape, dtype=inputs.dtype).masked_fill(hidden, torch.finfo(inputs.dtype).min)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=["openvla", "oft"])
    parser.add_argument("source", type=Path, help="a clone of the original")
    parser.add_argument("golden", type=Path, help="folder of the golden set")
    parser.add_argument("output", type=Path, help="safetensors; what it holds of the other one stays")
    parser.add_argument("--single", action="store_true", help="single precision")
    options = parser.parse_args()
    stand_in_libraries()
    from transformers.models.llama import modeling_llama

    dtype = torch.float32 if options.single else torch.float64
    if options.which == "oft":
        modeling_llama.LlamaModel._update_causal_mask = attend_both_ways
    checkpoint = options.golden / {"openvla": "tiny-openvla-fused", "oft": "tiny-openvla-oft"}[options.which]
    model = load_original(options.source, checkpoint, dtype)
    record = functools.partial({"openvla": record_openvla, "oft": record_oft}[options.which], model, options.golden)
    if options.single:
        found = record(dtype)
    else:
        with compute_in_double(model, modeling_llama):
            found = record(dtype)
    kept = load_file(options.output) if options.output.exists() else {}
    save_file(kept | {name: value.contiguous() for name, value in found.items()}, options.output)


if __name__ == "__main__":
    main()

"""What a stream costs before it is run: GPU memory, hours and bytes on disk, by arithmetic on the model's own shapes.

python -m infovla_peft.costs prints the tables of recipes/README.md. Nothing in them is measured on a GPU. Parameters
are counted on the architecture (built without memory); the formats' bytes are those of the files this package writes,
and tests hold them against real ones. Assumptions have names, below.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from .adapters import target_modules
from .models.openvla import OpenVLAConfig, OpenVLAForActionPrediction
from .models.openvla.quantization import NOT_QUANTIZED
from .policy import chunk_length

GB = 1e9
RANK, BATCH, STEPS, COUNTERFACTUAL_FRAMES = 32, 16, 600, 2048
"""The recipe's: lora_r, samples per optimiser step, stage_steps, counterfactual_frames."""
TRAJECTORY_FRAMES = 130
"""Frames of one kept trajectory: about LIBERO-Goal's."""
WORDS = 24
"""Language tokens of a prompt: about LIBERO-Goal's."""
PNG_BYTES_PER_PIXEL = 1.5
"""Of a rendered 256-px frame; uncompressed it is 3. Assumed."""
ACTIVATIONS_PER_TOKEN = 34 + 16
"""Bytes kept per token and unit of width while a block's backward pass runs: 34 (Korthikanti et al., 2205.05198, flash
attention), and the adapters' inputs in float32. Assumed."""
OVERHEAD = 2.0 * GB
"""CUDA's context, workspaces and fragmentation. Assumed."""
UTILISATION = {"bf16": 0.4, "nf4": 0.25}
"""Share of the GPU's peak that training reaches; NF4 unpacks every weight before each product. Assumed."""
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Per parameter: 4 bits, an 8-bit scale per 64 of them, and a float32 scale per 256 of those (double quantisation)."""
GPUS = {24: ("RTX 4090", 165e12), 40: ("A100", 312e12), 80: ("H100", 989e12)}
"""Memory in GB → name, and peak of dense bfloat16 products per second (vendor)."""


@dataclass(frozen=True)
class Shape:
    """Counts of one model.

    Attributes:
        parameters: all of them, and of which `quantised` would be held in 4 bits.
        adapter: parameters of one LoRA.
        width, layers: of the language model.
        vision_width, vision_layers: summed over the vision transformers, and of the deepest one.
        patches: vision tokens; outputs: numbers of the policy's answer (positions times bins, or a chunk's numbers).
    """

    parameters: int
    quantised: int
    adapter: int
    width: int
    layers: int
    vision_width: int
    vision_layers: int
    patches: int
    outputs: int

    @property
    def tokens(self) -> int:
        """Of one sample: vision, the prompt, the action."""
        return self.patches + WORDS + 8


def shape_of(model: nn.Module, *, rank: int = RANK) -> Shape:
    """Count a model's parameters and those of an adapter on all of its linear layers."""
    openvla: OpenVLAForActionPrediction = model  # type: ignore[assignment]
    config, text = openvla.config, openvla.config.text_config
    modules = dict(model.named_modules())
    targets = [modules[name] for name in target_modules(model, "all-linear")]
    linear = {
        name: module
        for name, module in modules.items()
        if isinstance(module, nn.Linear) and not any(part in NOT_QUANTIZED for part in name.split("."))
    }
    towers = [module.blocks for name, module in modules.items() if name.endswith("featurizer")]
    chunk = chunk_length(config)
    bins = 1 if config.action_head == "l1" else config.n_action_bins
    return Shape(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        quantised=sum(module.weight.numel() for module in linear.values()),
        adapter=sum(rank * (module.in_features + module.out_features) for module in targets),
        width=text.hidden_size,
        layers=text.num_hidden_layers,
        vision_width=sum(blocks[0].norm1.weight.numel() for blocks in towers),
        vision_layers=max(len(blocks) for blocks in towers),
        patches=openvla.vision_backbone.featurizer.shape.num_patches * config.num_images_in_input,
        outputs=chunk * config.action_dim * bins,
    )


def openvla_7b() -> Shape:
    """Of `openvla/openvla-7b`, built without memory."""
    config = OpenVLAConfig(
        vision_backbone_id="dinosiglip-vit-so-224px", llm_backbone_id="llama2-7b-pure", use_fused_vision_backbone=True
    )
    with torch.device("meta"):
        return shape_of(OpenVLAForActionPrediction(config))


def weight_bytes(shape: Shape, held: str) -> float:
    """The frozen base: bfloat16, or NF4 where it is quantised."""
    packed = shape.quantised * NF4_BYTES if held == "nf4" else shape.quantised * 2.0
    return packed + (shape.parameters - shape.quantised) * 2.0


def training_bytes(shape: Shape, held: str, batch: int) -> float:
    """Of a training step with activation checkpointing: base, two adapters, gradient, Adam, activations, overhead.

    The adapter in training takes 16 bytes per parameter (float32 weight, gradient, two moments), the one before 4.
    Each block keeps its input in bfloat16, and one block at a time all that its backward pass needs.
    """
    kept = shape.tokens * shape.width * shape.layers * 2 + shape.patches * shape.vision_width * shape.vision_layers * 2
    block = shape.tokens * shape.width * ACTIVATIONS_PER_TOKEN
    return weight_bytes(shape, held) + shape.adapter * (16 + 4) + batch * (kept + block) + OVERHEAD


def stage_flops(shape: Shape) -> float:
    """Of one stage: training (forward, once more for checkpointing, backward to the inputs), anchors, answers."""
    forward = 2.0 * shape.parameters * shape.tokens
    # Of the current task's frames the teacher gives answers and anchors, of the memory's anchors.
    asked = 2 * COUNTERFACTUAL_FRAMES + TRAJECTORY_FRAMES
    return 3 * forward * STEPS * BATCH + forward * asked


def adapter_bytes(shape: Shape) -> int:
    """`adapter_model.safetensors`, float32, without its header."""
    return 4 * shape.adapter


def anchor_bytes(shape: Shape, frames: int, words: int = WORDS, views: int = 1) -> int:
    """`memory/anchors.safetensors` of one task, without its header: see `memory.Anchors`."""
    numbers = shape.width + shape.patches * words + 2 * shape.width + shape.outputs
    return views * frames * (4 * numbers + 2 * 8) + frames * 8


def frames_bytes(frames: int, side: int = 256, cameras: int = 1) -> float:
    """`memory/frames` of one task: pictures, state, action."""
    return frames * (cameras * side * side * PNG_BYTES_PER_PIXEL + (8 + 7) * 4)


def largest_batch(shape: Shape, held: str, memory: float) -> int:
    """The largest power of two up to the whole batch that fits; 0 if none does."""
    fitting = [2**k for k in range(5) if 2**k <= BATCH and training_bytes(shape, held, 2**k) <= memory]
    return max(fitting, default=0)


def training_table(shape: Shape) -> Iterator[str]:
    """Memory and hours of LoRA on a 7 B base, as Markdown."""
    yield "| GPU | base held in | samples at once | memory in GB | hours, 10 tasks | hours, 100 tasks |"
    yield "|---|---|---|---|---|---|"
    for memory, (name, peak) in GPUS.items():
        for held in ("bf16", "nf4"):
            batch = largest_batch(shape, held, memory * GB)
            hours = stage_flops(shape) / (peak * UTILISATION[held]) / 3600
            used = f"{batch} | {training_bytes(shape, held, batch) / GB:.1f} | {10 * hours:.1f} | {100 * hours:.0f}"
            yield f"| {name}, {memory} GB | {held} | {used if batch else 'does not fit | - | - | -'} |"


def storage_table(shape: Shape) -> Iterator[str]:
    """Bytes on disk per past task, as Markdown."""
    one = {
        "adapter (float32)": float(adapter_bytes(shape)),
        f"memory, one trajectory of {TRAJECTORY_FRAMES} frames": frames_bytes(TRAJECTORY_FRAMES),
        "its anchors": float(anchor_bytes(shape, TRAJECTORY_FRAMES)),
    }
    yield "| stored per task | MB | 10 tasks, GB | 100 tasks, GB |"
    yield "|---|---|---|---|"
    for what, size in {**one, "together": sum(one.values())}.items():
        yield f"| {what} | {size / 1e6:.1f} | {size / 1e8:.2f} | {size / 1e7:.1f} |"


def tables() -> str:
    """Both, as they stand in recipes/README.md."""
    shape = openvla_7b()
    return "\n".join([*training_table(shape), "", *storage_table(shape)])


if __name__ == "__main__":
    print(tables())

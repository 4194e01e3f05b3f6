"""A tiny OpenVLA-OFT with random weights and its own small tokeniser, for training from scratch and for tests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import LlamaConfig, PreTrainedTokenizerFast

from .configuration_openvla import OpenVLAConfig
from .modeling_openvla import OpenVLAForActionPrediction
from .processing_openvla import PrismaticImageProcessor, PrismaticProcessor, build_prompt

N_ACTION_BINS = 256
_BLOCK = 64  # the text vocabulary and its padding are multiples of this, as OpenVLA's are


def build_tiny_tokenizer(instructions: Sequence[str], text_vocab_size: int = 512) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokeniser that knows the words of `instructions` and can write any other text.

    Ids: <unk>, <s>, </s>, bytes and merges, unused ones, then 256 action tokens (the last of the vocabulary, as
    OpenVLA has it), then <PAD>.
    """
    specials = ["<unk>", "<s>", "</s>"]
    prompts = sorted({build_prompt(instruction) for instruction in instructions})
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=text_vocab_size,
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(prompts, trainer)
    bpe = json.loads(tokenizer.to_str())["model"]
    vocabulary: dict[str, int] = dict(bpe["vocab"])
    for index in range(len(vocabulary), max(text_vocab_size, len(vocabulary))):
        vocabulary[f"<unused{index}>"] = index
    # Private-use characters: one token each, never part of an instruction.
    actions = [chr(0xE000 + index) for index in range(N_ACTION_BINS)]
    vocabulary |= {token: len(vocabulary) + index for index, token in enumerate(actions)}
    tokenizer.model = models.BPE(vocab=vocabulary, merges=[tuple(merge) for merge in bpe["merges"]], unk_token="<unk>")
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in actions])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<PAD>",
        padding_side="right",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def build_tiny_openvla(
    *,
    instructions: Sequence[str],
    image_size: int = 128,
    patch_size: int = 16,
    vision_width: int = 128,
    vision_depth: int = 4,
    hidden_size: int = 128,
    layers: int = 4,
    heads: int = 4,
    chunk: int = 8,
    action_dim: int = 7,
    proprio_dim: int = 8,
    num_images: int = 1,
    fused: bool = False,
    norm_stats: dict[str, Any] | None = None,
    seed: int = 0,
) -> tuple[OpenVLAForActionPrediction, PrismaticProcessor]:
    """A model of OpenVLA-OFT's shape (parallel decoding, L1 head) with about one million random parameters.

    Args:
        instructions: texts whose words the tokeniser shall know; any other text works too.
        image_size, patch_size: of the square input image, in pixels.
        vision_width, vision_depth: of each vision transformer. Its last block is stored but never run.
        hidden_size, layers, heads: of the language model; the vision transformers have as many heads.
        chunk, action_dim, proprio_dim, num_images: shape of the policy; `proprio_dim=0` for none.
        fused: two vision transformers (DINOv2- and SigLIP-shaped) instead of one (SigLIP-shaped).
        norm_stats: statistics per data set, as in `dataset_statistics.json`; None gives neutral ones ("tiny").
        seed: of the random weights; the caller's random state is left as it was.

    Returns:
        The model in training mode, and its processor. Both can be saved and loaded like a published checkpoint.
    """
    tokenizer = build_tiny_tokenizer(instructions)
    siglip = {
        "img_size": image_size,
        "patch_size": patch_size,
        "embed_dim": vision_width,
        "depth": vision_depth,
        "num_heads": heads,
        "class_token": False,
        "global_pool": "map",
    }
    dino = {**siglip, "class_token": True, "global_pool": "token", "reg_tokens": 4, "no_embed_class": True}
    towers = 2 if fused else 1
    if norm_stats is None:
        norm_stats = {"tiny": {"action": _neutral(action_dim)}}
        if proprio_dim:
            norm_stats["tiny"]["proprio"] = _neutral(proprio_dim)
    config = OpenVLAConfig(
        architectures=["OpenVLAForActionPrediction"],
        vision_backbone_id="dinosiglip-vit-so-224px" if fused else "siglip-vit-so400m",
        llm_backbone_id="llama2-7b-pure",
        arch_specifier="no-align+fused-gelu-mlp" if fused else "no-align+gelu-mlp",
        image_resize_strategy="resize-naive",
        image_sizes=[image_size] * towers,
        timm_model_ids=["vit_tiny_dinov2", "vit_tiny_siglip"][-towers:],
        tiny_timm_kwargs=[dino, siglip][-towers:],
        text_config=LlamaConfig(
            vocab_size=tokenizer.vocab_size + _BLOCK,
            hidden_size=hidden_size,
            intermediate_size=_BLOCK * -(-hidden_size * 8 // (3 * _BLOCK)),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            pad_token_id=tokenizer.pad_token_id,
            dtype="float32",
        ),
        pad_token_id=tokenizer.pad_token_id,
        pad_to_multiple_of=_BLOCK,
        norm_stats=norm_stats,
        n_action_bins=N_ACTION_BINS,
        decoding="parallel",
        action_head="l1",
        num_actions_chunk=chunk,
        action_dim=action_dim,
        proprio_dim=proprio_dim,
        num_images_in_input=num_images,
        empty_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = OpenVLAForActionPrediction(config)
        _scale_by_width(model)
    image_processor = PrismaticImageProcessor(
        use_fused_vision_backbone=fused,
        image_resize_strategy="resize-naive",
        input_sizes=[(3, image_size, image_size)] * towers,
        means=[(0.485, 0.456, 0.406), (0.5, 0.5, 0.5)][-towers:],
        stds=[(0.229, 0.224, 0.225), (0.5, 0.5, 0.5)][-towers:],
    )
    return model.train(), PrismaticProcessor(image_processor, tokenizer)


def _scale_by_width(model: OpenVLAForActionPrediction) -> None:
    """Start weights in proportion to 1/√(inputs) of their layer.

    The fixed 0.02 of the large models is too small at this width: trained on the same batches, the loss stays where
    it is without images (0.23 after 250 steps on three tasks of LIBERO-Goal, against 0.15 with this).
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.startswith("language_model."):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
        elif isinstance(module, nn.Linear | nn.Conv2d):
            module.reset_parameters()


def _neutral(dim: int) -> dict[str, list[float] | list[bool]]:
    """Statistics under which normalised and raw numbers are the same."""
    low, high = [-1.0] * dim, [1.0] * dim
    return {"mean": [0.0] * dim, "std": high, "min": low, "max": high, "q01": low, "q99": high, "mask": [True] * dim}

"""What an action costs: batches beside single samples, and plain OpenVLA beside decoding as the original does it.

A call is a whole one: images and instructions in, un-normalised actions out. The reference for latency works the way
the original's `predict_action` does, one sample after another: transformers' `generate`, logits of the whole
vocabulary at every position of the prompt and for every token. It runs on this package's modules, which is to its
advantage where those are faster than the original's; its actions must be ours, else nothing is reported.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from ..command_options import positive
from ..data.normalisation import Normaliser
from ..hub import check_device
from ..inference import Policy
from ..models.openvla import OpenVLAConfig, OpenVLAForActionPrediction, build_prompt, build_tiny_openvla
from ..models.openvla.acting import unnormalize_actions
from ..models.openvla.sequence import insert_after_bos
from .harness import Report, interleave

INSTRUCTION = "pick up the black bowl between the plate and the ramekin and place it on the plate"
_TINY: dict[str, Any] = {
    "image_size": 56, "patch_size": 14, "vision_width": 48, "vision_depth": 4, "hidden_size": 32, "layers": 3,
    "heads": 4, "fused": True,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": _TINY,
    "mid": {**_TINY, "hidden_size": 512, "layers": 8, "heads": 8},
}
"""tiny: 16 patches, three decoder layers of width 32; mid: eight of width 512. Both with Llama-2's 32064 tokens."""
_VOCABULARY = 32064
_ACTION_ROWS_SCALE = 6.0  # random weights seldom choose an action token among 32064: the reference would read words


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `infovla bench act`."""
    parser.add_argument("--repetitions", type=positive, default=15, help="rounds of every comparison")
    parser.add_argument("--shapes", nargs="+", choices=tuple(SHAPES), default=list(SHAPES), help="for the latency")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu is steadier on a busy machine")
    parser.add_argument("--device", default="cpu", help="of the model, as torch names it")


def run(options: argparse.Namespace) -> Report:
    """Batch 8 over batch 1 for both decoders, and latency over the reference.

    Raises:
        RuntimeError: ours and the reference disagree on an action.
    """
    report = Report(f"Acting, {options.clock} time, on {options.device}")
    report.note("clock", options.clock)
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    for decoding, suffix in (("autoregressive", ""), ("parallel", "_parallel")):
        acting = make_acting("tiny", decoding, options.device)
        calls = {f"batch{size}_{decoding}": acting.call(size) for size in (1, 8)}
        one, eight = _measure(report, calls, options.repetitions, clock)
        report.add_ratio(f"batch8_over_batch1{suffix}", eight, one, at_most=2.5)
    for shape in options.shapes:
        acting = make_acting(shape, "autoregressive", options.device)
        report.note(f"identical_actions_{shape}", check_against_reference(acting))
        reference = partial(Reference(acting.policy), acting.images[:1], INSTRUCTION)
        contestants: dict[str, Callable[[], Any]] = {f"latency_{shape}": acting.call(1)}
        contestants[f"latency_{shape}_reference"] = reference
        ours, theirs = _measure(report, contestants, options.repetitions, clock)
        report.add_ratio(f"latency_ratio_reference_{shape}", ours, theirs, at_most=0.7)
    return report


def _measure(
    report: Report, calls: dict[str, Callable[[], Any]], repetitions: int, clock: Callable[[], float]
) -> list[list[float]]:
    seconds = interleave(calls, repetitions=repetitions, warm_up=2, clock=clock)
    for name, samples in seconds.items():
        report.add_figure(name, samples, "s")
    return list(seconds.values())


@dataclass
class Acting:
    """A policy and random images, some of which it is shown at once."""

    policy: Policy
    images: list[NDArray[np.uint8]]  # eight of (side, side, 3)

    def call(self, batch: int) -> Callable[[], NDArray[Any]]:
        """A call for `batch` observations: (batch, chunk, 7), on the host, so that no work is left to wait for."""
        states = None
        if self.policy.model.config.proprio_dim:
            states = [np.zeros(self.policy.model.config.proprio_dim, dtype=np.float32)] * batch
        return partial(self.policy.act_batch, self.images[:batch], [INSTRUCTION] * batch, states)


def make_acting(shape: str, decoding: str, device: str = "cpu") -> Acting:
    """A random policy of a shape, plain OpenVLA ("autoregressive") or OpenVLA-OFT with its L1 head ("parallel")."""
    check_device(device)
    tiny, processor = build_tiny_openvla(instructions=[INSTRUCTION], **SHAPES[shape])
    fields = tiny.config.to_dict()
    fields["text_config"] = {**fields["text_config"], "vocab_size": _VOCABULARY}
    if decoding == "autoregressive":
        fields |= {"decoding": decoding, "action_head": "discrete", "proprio_dim": 0, "empty_token_id": 7}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = OpenVLAForActionPrediction(OpenVLAConfig(**fields))
    first = model.config.action_token_begin_id + 1
    with torch.no_grad():
        rows = model.language_model.lm_head.weight[first : first + model.config.n_action_bins]
        rows *= _ACTION_ROWS_SCALE
    side = SHAPES[shape]["image_size"]
    images = np.random.default_rng(0).integers(0, 256, (8, side, side, 3), dtype=np.uint8)
    policy = Policy(model.to(device), processor, Normaliser(model.norm_stats))
    return Acting(policy, list(images))


class _EveryLogit(LlamaForCausalLM):  # type: ignore[no-untyped-call]
    """Gives `generate` the logits of every position of the prompt, as transformers did in the original's day."""

    def _supports_logits_to_keep(self) -> bool:
        return False


class Reference:
    """Acting as the original's `predict_action` does it."""

    def __init__(self, policy: Policy) -> None:
        self._policy, self._model = policy, policy.model
        self._language_model = copy.copy(policy.model.language_model)  # shares every module and weight
        self._language_model.__class__ = _EveryLogit

    @torch.inference_mode()
    def __call__(self, images: Sequence[NDArray[np.uint8]], instruction: str) -> NDArray[Any]:
        """(samples, dim), one sample after another."""
        return np.stack([self._act(image, instruction) for image in images])

    def _act(self, image: NDArray[np.uint8], instruction: str) -> NDArray[Any]:
        model = self._model
        inputs = self._policy.processor(build_prompt(instruction), image).to(model.device)
        ids: Tensor = inputs["input_ids"]
        if not torch.all(ids[:, -1] == model.config.empty_token_id):
            ids = torch.cat([ids, ids.new_tensor([[model.config.empty_token_id]])], dim=1)
        features = model.projector(model.vision_backbone(inputs["pixel_values"].to(model.dtype)))
        embeddings = insert_after_bos(model.get_input_embeddings()(ids), features)
        dim = model.get_action_dim(self._policy.normaliser.key)
        tokens = self._language_model.generate(
            inputs_embeds=embeddings,
            attention_mask=embeddings.new_ones(embeddings.shape[:2], dtype=torch.long),
            max_new_tokens=dim,
            do_sample=False,
        )
        normalised = model.bins.decode(tokens[0, -dim:].cpu().numpy())
        return unnormalize_actions(normalised, model.get_action_stats(self._policy.normaliser.key), model.config)


def check_against_reference(acting: Acting) -> int:
    """How many numbers of how many actions are the same: all, or a RuntimeError."""
    theirs = Reference(acting.policy)(acting.images, INSTRUCTION)
    for batch in (1, len(theirs)):
        ours = acting.call(batch)()[:, 0]
        if not np.array_equal(ours, theirs[:batch]):
            raise RuntimeError(f"batches of {batch} give other actions than the reference:\n{ours}\n{theirs[:batch]}")
    return int(theirs.size)

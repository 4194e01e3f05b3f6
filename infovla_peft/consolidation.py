"""EWC: which of an adapter's parameters past tasks depend on, and the penalty for moving them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor

from .adapters import adapter_parameters
from .data.chunks import FrameTable
from .data.collator import VLACollator
from .integrity import DamagedFileError
from .tensor_files import load_tensors, save_tensors


class Consolidation:
    """Online Elastic Weight Consolidation on the adapter's parameters.

        L_EWC = ½ Σ_p F_p (θ_p − θ*_p)²,   F ← γ F + F_new

    Kirkpatrick et al. (1612.00796), in the online form of Schwarz et al. (1805.06370): one Fisher and one reference,
    those of the end of the stage before. F_new is the mean of squared gradients of single samples' policy loss
    (empirical Fisher), times the tasks that they are of, as log-posteriors of tasks add up: the five tasks of a base
    weigh five times what a later one does. The penalty is no mean over a batch, so it does not depend on its size.

    Deviations: only the adapter has a Fisher, because only it is trained. For the base's tasks it is measured on the
    first adapter before its training; there B = 0 and A has no gradient, so that it keeps B near 0 and leaves A free.
    The policy loss is a mean over a chunk's numbers and no log-likelihood: if that likelihood is c times the loss, F
    is too small by c², and the penalty, relative to the loss, by c, which
    `InfoVLAConfig.lambda_ewc` contains.

    Args:
        fisher, reference: by the names of the adapter's parameters, its own name left out.
    """

    def __init__(self, fisher: dict[str, Tensor], reference: dict[str, Tensor]) -> None:
        self.fisher, self.reference = fisher, reference

    @classmethod
    def measure(
        cls,
        model: PeftModel,
        name: str,
        data: FrameTable,
        collator: VLACollator,
        *,
        samples: int,
        seed: int,
        tasks: int = 1,
        before: Consolidation | None = None,
        decay: float = 1.0,
    ) -> Consolidation:
        """Fisher of the adapter `name` as it stands, on some frames of the tasks just learned.

        Args:
            data: their demonstrations.
            samples: so many frames are drawn; each costs a forward and a backward pass of its own.
            tasks: how many tasks these are.
            before: of the stages before; its Fisher counts `decay`-fold (γ).
        """
        parameters = {_plain(key, name): parameter for key, parameter in adapter_parameters(model, name)}
        fisher = {key: torch.zeros_like(parameter) for key, parameter in parameters.items()}
        rows = np.random.default_rng(seed).permutation(len(data))[:samples]
        device = next(iter(parameters.values())).device
        training = model.training
        model.eval()
        for row in rows:
            batch = {key: tensor.to(device) for key, tensor in collator(data.__getitems__([row])).items()}
            gradients = torch.autograd.grad(
                model(**batch, return_logits=False).loss, list(parameters.values()), allow_unused=True
            )
            for key, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    fisher[key] += tasks * gradient.detach() ** 2 / len(rows)
        model.train(training)
        if before is not None:
            fisher = {key: value + decay * before.fisher[key].to(device) for key, value in fisher.items()}
        return cls(fisher, {key: parameter.detach().clone() for key, parameter in parameters.items()})

    def check(self, model: PeftModel, name: str) -> None:
        """Raise a ValueError if it is of an adapter with other matrices than `name` has."""
        shapes = {_plain(key, name): tuple(parameter.shape) for key, parameter in adapter_parameters(model, name)}
        for kind, held in (("fisher", self.fisher), ("reference", self.reference)):
            if shapes != (found := {key: tuple(tensor.shape) for key, tensor in held.items()}):
                other = next(key for key in {**shapes, **found} if shapes.get(key) != found.get(key))
                raise ValueError(
                    f"the consolidation is of another adapter than {name!r}: the {kind} of {other} is "
                    f"{found.get(other, 'missing')}, in the adapter it is {shapes.get(other, 'missing')}; train with "
                    "the lora_r and lora_targets that it was measured with, or measure it anew"
                )

    def penalty(self, model: PeftModel, name: str) -> Tensor:
        """Scalar ≥ 0; 0 at the reference."""
        total: Any = 0.0
        for key, parameter in adapter_parameters(model, name):
            plain = _plain(key, name)
            total = total + (self.fisher[plain] * (parameter - self.reference[plain]) ** 2).sum()
        return 0.5 * total  # type: ignore[no-any-return]

    def to(self, device: torch.device | str) -> Consolidation:
        return Consolidation(
            *({key: tensor.to(device) for key, tensor in each.items()} for each in (self.fisher, self.reference))
        )

    def save(self, path: Path, *, stage: int) -> None:
        """Write a safetensors file with a checksum, and the stage that it is for."""
        tensors = {f"fisher.{key}": value for key, value in self.fisher.items()}
        tensors |= {f"reference.{key}": value for key, value in self.reference.items()}
        save_tensors(path, tensors, {"stage": str(stage)})

    @classmethod
    def load(cls, path: Path, *, stage: int) -> Consolidation:
        """Read what `save` wrote; a DamagedFileError names a file that is damaged, or of another stage."""
        tensors, notes = load_tensors(path)
        if notes.get("stage", str(stage)) != str(stage):
            raise DamagedFileError(f"{path} is of stage {notes['stage']:.20}, not of stage {stage}")
        return cls(
            *(
                {key.removeprefix(kind): value for key, value in tensors.items() if key.startswith(kind)}
                for kind in ("fisher.", "reference.")
            )
        )


def _plain(key: str, name: str) -> str:
    return key.replace(f".{name}.", ".")

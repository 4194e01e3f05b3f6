"""`InfoVLATrainer`: 🤗 Trainer with replay, and with terms against stored anchors beside the policy loss."""

from __future__ import annotations

import copy
import math
import shutil
import signal
import weakref
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, cast

import datasets
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import TrainOutput

from .adapters import (
    TERM_NETWORK,
    base_model,
    check_trained,
    freeze_unused,
    read_adapter_weights,
    write_adapter_weights,
)
from .checkpoints import STAGING, check_continuable, check_whole, keep_newest, last_checkpoint, publish_checkpoint
from .compilation import compiled_blocks
from .config import NOT_COMPILED, InfoVLAConfig
from .conflict import CURRENT, REPLAY, conflicts
from .consolidation import Consolidation
from .data.chunks import ChunkDataset, ReplayRows
from .data.collator import VLACollator
from .data.sampling import StratifiedBatchSampler
from .distributed import whole, whole_state
from .divergence import DivergenceError, describe_batch, divergence_reason
from .engine import check_engine
from .features import FeatureTap, extract_features, policy_output
from .files import make_folder
from .interference import most_interfered, sample_losses
from .interruption import Stopped, deferred_stop, requested_stop
from .loss_log import LossLog
from .losses import output_distillation_loss
from .memory import Anchors, ReplayMemory
from .methods import METHODS
from .rehearsal import Rehearsal
from .terms import Term
from .trackers import JSONL, trainer_report_to
from .vision_cache import VisionCache, check_cacheable

_TERM_WEIGHTS = "term_networks.safetensors"
_NO_PUSH = (
    "push_to_hub: Trainer would push checkpoints, pickles included. Leave it out, and push what is finished: a run by "
    "`infovla push` or `push_to_hub`, a single adapter by `model.push_to_hub` (PEFT)"
)


class InfoVLATrainer(Trainer):
    """Trains one stage of a stream: the base (all parameters), or one task's adapter.

        L = L_policy(current + replay) + Σ λ_t L_t(replay)         (paper, Eq. 7)

    The teacher runs once, when `train` begins, over the replayed frames; what it makes of the memory (its anchors) is
    stored with it. A training step is one forward pass of the student, of which one layer is tapped. A term without
    information in a batch (a single candidate, say) is skipped and counted. The log holds, beside Trainer's own
    entries, `policy_loss`, each term (`rac`, `cmi`, `output`: means over the batches since the last entry, before λ)
    and `rac_skipped` and so on; with `log_gradients`, what `conflict.conflicts` finds in that step.

    Where a batch may hold counterfactual frames, an L1 policy loss becomes smooth L1, as in
    `losses.output_distillation_loss`: their labels are actions that the student reproduces at the start
    (on the first view of a frame, whose label the other views have too).

    Without a PEFT model, all parameters are trained that ever receive a gradient: that is the base stage. Such a model
    can replay (`er`), but has no frozen teacher. Without past tasks there is no replay and no term.

    Two processes with batches of B give the loss and the gradient of one with 2B. A resumed run reproduces the
    uninterrupted one: batch k is a function of the seed and k. Trainer's "epoch" is the whole of this training.

    Args:
        model: an OpenVLA, or a `PeftModel` of one whose active adapter is trained (see `adapters.add_adapter`).
        args: the configuration.
        train_dataset: the current task's samples, in chunks of the model's length.
        data_collator: with the frozen normalisation.
        memory: of past tasks. If it has a folder, anchors are stored there.
        previous_adapter: name of the adapter of the stage before; None where that stage is the base. Only used by
            `teacher="previous"`.
        past_tasks: name → instruction of the tasks learned before, for counterfactual frames; None = the memory's.
        learned_by: name of a past task → name of the adapter that learned it. Used by `teacher="auto"`, and by
            `teacher="base"`, whose answers on tasks of others are not kept. Tasks that are not in it are the base's:
            without it, `teacher="base"` holds the policy to the base's answers on all of them, learned or not.
        consolidation: what past tasks depend on, for `method="ewc"` (`Consolidation.measure`).
        kwargs: further arguments of `Trainer`.

    Raises:
        TypeError: an argument is of another kind, or data and collator are swapped.
        ValueError: `push_to_hub`, or an argument of Trainer that would have no effect.
        ValueError: a teacher that is in training or not loaded, or a task in `learned_by` that nobody knows.
        ValueError: `method="ewc"` with past tasks and no consolidation, or with that of an adapter of another shape,
            or a consolidation for another method.
        ValueError: as training begins, features are tapped where no layer before is trained.
        ValueError: samples of another chunk length than the model's, a batch too small for replay.
        ValueError: nothing to train, or more than is saved: of a `PeftModel`, one adapter's LoRA matrices.

    Example:
        >>> trainer = InfoVLATrainer(model, args, dataset, collator, memory=memory)  # doctest: +SKIP
        >>> trainer.train(resume_from_checkpoint=True)  # doctest: +SKIP
    """

    args: InfoVLAConfig

    def __init__(
        self,
        model: nn.Module,
        args: InfoVLAConfig,
        train_dataset: ChunkDataset,
        data_collator: VLACollator,
        *,
        memory: ReplayMemory | None = None,
        previous_adapter: str | None = None,
        past_tasks: Mapping[str, str] | None = None,
        learned_by: Mapping[str, str] | None = None,
        consolidation: Consolidation | None = None,
        **kwargs: Any,
    ) -> None:
        _check_kinds(model, args, train_dataset, data_collator)
        _check_past(memory, past_tasks, learned_by, consolidation)
        _check_samples(kwargs.get("eval_dataset"))
        unused = ("compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics")
        if given := [name for name in unused if kwargs.get(name) is not None]:
            raise ValueError(f"{', '.join(given)}: the policy's loss is the model's own; subclass to change it")
        if args.push_to_hub:
            raise ValueError(_NO_PUSH)
        _check_chunk(model, train_dataset)
        if isinstance(model, PeftModel):
            check_trained(model)
        _check_consolidation(model, args.method, past_tasks, consolidation)
        args = copy.copy(args)
        self.rehearsal = Rehearsal(
            model, args, train_dataset, data_collator, memory=memory, previous_adapter=previous_adapter,
            past_tasks=past_tasks, learned_by=learned_by,
        )  # fmt: skip
        for term in self.terms:
            if term.network is not None:
                if not isinstance(model, PeftModel):  # it would be saved among the model's own weights
                    raise ValueError("cmi_mode='paper' trains a network of its own; use it with an adapter")
                model.add_module(TERM_NETWORK.format(term.name), term.network)  # the optimiser and DDP see it there
        if not isinstance(model, PeftModel):
            freeze_unused(model)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError(
                "nothing is trainable: add an adapter (adapters.add_adapter), or activate one as trainable"
            )
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False  # everything trainable receives a gradient in every step
        if args.max_steps <= 0:
            replayed = self.rehearsal.sampler(args.train_batch_size, 1).replay_size
            args.max_steps = _steps(args, len(train_dataset), replayed)
        self._collator = data_collator
        if JSONL in (args.report_to or ()):  # no tracker of Trainer's
            args.report_to = trainer_report_to(args.report_to)
            if not any(isinstance(callback, LossLog) for callback in kwargs.get("callbacks") or ()):
                log = LossLog(Path(str(args.output_dir)) / "log.jsonl", stage=0)
                kwargs["callbacks"] = [*(kwargs.get("callbacks") or ()), log]
        if args.should_save:
            make_folder(Path(str(args.output_dir)))  # Trainer would not enter it on the disk
        collate = cast(Any, data_collator)  # fetched as `Samples`, not as lists
        super().__init__(model=model, args=args, train_dataset=train_dataset, data_collator=collate, **kwargs)
        if self.accelerator.state.dynamo_plugin.backend.value != "NO":
            raise ValueError(NOT_COMPILED.format("accelerate's dynamo_backend"))
        self.add_callback(_AskTeachers(self))
        check_engine(args, sharded=self.is_fsdp_enabled or self.is_deepspeed_enabled)
        self.loss_is_scaled_for_ga = False  # `compute_loss` gives the mean of its batch
        self._stop = _StopOnSignal(self)
        self.add_callback(self._stop)
        self._loss: Tensor | float = math.nan
        self._staging: str | None = None
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._consolidation = consolidation.to(args.device) if consolidation is not None else None
        self._check_retrieval(self._sampler())  # fails now, not after the anchors are computed
        self._vision: VisionCache | None = None
        if args.cache_vision_features:
            check_cacheable(model, args, replayed_anew=bool(self.rehearsal) and self.rehearsal.views is None)

    @property
    def memory(self) -> ReplayMemory | None:
        """What is replayed of the memory, with its anchors as soon as they are computed."""
        return self.rehearsal.memory

    @property
    def terms(self) -> Sequence[Term]:
        """The terms beside the policy loss."""
        return self.rehearsal.terms

    # --- data --------------------------------------------------------------------------------------------------------

    def _sampler(self) -> StratifiedBatchSampler:
        batches = self.args.max_steps * self.args.gradient_accumulation_steps
        return self.rehearsal.sampler(self._train_batch_size, batches)

    def _check_retrieval(self, sampler: StratifiedBatchSampler) -> None:
        batch, processes = self._train_batch_size * self.args.world_size, self.args.world_size
        fewest = min(sampler.replay_size, batch - sampler.replay_size)
        if METHODS[self.args.method].retrieves and self.rehearsal and fewest < processes:
            raise ValueError(
                f"method={self.args.method!r} chooses in each process what to replay beside the new task's samples: "
                f"{sampler.replay_size} of the {batch} samples of a step are replayed, and each of {processes} "
                "processes needs one of either kind; raise per_device_train_batch_size, or change replay_fraction"
            )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Batches of held-out samples, for `evaluate`."""
        _check_samples(eval_dataset)
        return super().get_eval_dataloader(eval_dataset)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches for this process. Not prepared by Accelerate: the sampler knows the processes already."""
        config = self.args
        # A batch is addressed by a `Draw` and fetched as `Samples`, not by and as lists.
        sampler, collator = cast(Any, self._sampler()), cast(Any, self._collator)
        return DataLoader(
            self.rehearsal.mixture(),
            batch_sampler=sampler,
            collate_fn=collator,
            num_workers=config.dataloader_num_workers,
            pin_memory=config.dataloader_pin_memory and config.device.type == "cuda",
            persistent_workers=config.dataloader_persistent_workers,
            prefetch_factor=config.dataloader_prefetch_factor,
        )

    def prepare_anchors(self) -> Anchors | None:
        """Ask the teachers about the replayed frames, see `Rehearsal.prepare`."""
        return self.rehearsal.prepare(
            batch_size=self._train_batch_size,
            autocast=self.accelerator.autocast,
            dtype=self.accelerator.mixed_precision,
        )

    def _keep_vision(self) -> None:
        if self.args.cache_vision_features and self.rehearsal and self._vision is None:
            self._vision = VisionCache(
                cast(nn.Module, self.model), self.rehearsal.tables, self._collator, self.rehearsal.views,
                str(self.args.output_dir), batch_size=self._train_batch_size, autocast=self.accelerator.autocast,
            )  # fmt: skip

    # --- training ----------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train, or go on training.

        Args:
            resume_from_checkpoint: a checkpoint's folder; True = the last whole one in `output_dir`, if any.

        Raises:
            FileNotFoundError: there is no such checkpoint.
            DamagedFileError: a file of it is missing or was changed.
            ValueError: under FSDP2, or where it was saved under FSDP2, a checkpoint cannot be continued.
            DivergenceError: loss or gradient ran away. The weights are those before that step, the checkpoints stay.
            Stopped: a signal ended it (see `interruption`); a checkpoint is saved.
        """
        last = resume_from_checkpoint is True
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(str(self.args.output_dir))
        if resume_from_checkpoint:
            check_continuable(resume_from_checkpoint, sharded=self.is_fsdp_enabled)
            if not last:  # which is checked already
                check_whole(resume_from_checkpoint)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            self._keep_vision()  # a sharded tower cannot be called by itself
        model = cast(nn.Module, self.model)
        compiled = compiled_blocks(model, self.args.tap_layer) if self.args.torch_compile else nullcontext()
        try:
            with deferred_stop(), compiled:
                output = super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self._vision = None  # and with it what it takes of the disk
        if (number := requested_stop() or self._stop.number) is not None:
            raise Stopped(number, last_checkpoint(str(self.args.output_dir)))
        return output

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The mean loss of one batch: policy loss and weighted terms, from one forward pass."""
        inputs = dict(inputs)
        replay: ReplayRows | None = inputs.pop("replay", None)
        current = len(inputs["input_ids"]) - (0 if replay is None else len(replay.own))  # samples; replay comes last
        if replay is not None and METHODS[self.args.method].retrieves:
            inputs = self._retrieve(inputs, len(replay.own))
        if self._vision is not None and replay is not None and len(replay.own):
            inputs["pixel_values"] = inputs["pixel_values"][: -len(replay.own)]
            inputs["patch_features"] = self._vision(replay.own).to(inputs["input_ids"].device, non_blocking=True)
        if replay is None or not self.terms:
            outputs = model(**inputs, return_logits=False)
            policy_loss, terms = self._policy_loss(outputs, inputs), {}
        else:
            with FeatureTap(base_model(cast(nn.Module, self.model)), self.args.tap_layer) as tap:
                outputs = model(**inputs, return_logits=False)
            policy_loss, terms = self._policy_loss(outputs, inputs), self._terms(tap.hidden, outputs, replay)
        self._note("policy_loss", policy_loss)
        if self._consolidation is not None and isinstance(self.model, PeftModel):
            penalty = self._consolidation.penalty(self.model, self.model.active_adapter)
            self._note("ewc", penalty)
            terms["ewc"] = self.args.lambda_ewc * penalty
        loss = policy_loss + sum(terms.values()) if terms else policy_loss
        # With one sample per process, some have none of the new task, and log nothing.
        if self.args.log_gradients and model.training and self._logs_this_step() and current:
            parts = {**self._policy_parts(outputs, inputs, current), **terms}
            for name, value in conflicts(parts, self._trained()).items():
                self._note(name, value)
        self._loss = loss.detach()
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The policy loss of held-out samples, for `evaluate`. How often the robot succeeds, rollouts say."""
        with torch.no_grad(), self.compute_loss_context_manager():
            batch = self._prepare_inputs(inputs)
            return self._policy_loss(model(**batch, return_logits=False), batch).detach().mean(), None, None

    def _policy_loss(self, outputs: Any, inputs: Mapping[str, Any]) -> Tensor:
        """The model's own loss; smooth L1 in place of L1 where labels may be the teacher's answers."""
        if self.rehearsal.regresses_answers:
            return output_distillation_loss(outputs.predicted_actions, inputs["actions"], kind="actions")
        return cast(Tensor, outputs.loss)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        # Trainer asks for it in every step, before the optimiser's: the last moment at which the weights are good.
        norm = super()._get_grad_norm(model, grad_norm)  # type: ignore[no-untyped-call]
        scaled = getattr(self.accelerator, "scaler", None) is not None
        size = None if norm is None else float(norm)
        problem = divergence_reason(float(self._loss), size, self.args.grad_norm_limit, scaled=scaled)
        if problem is not None:
            raise DivergenceError(self._explain_divergence(problem))
        return norm

    def _explain_divergence(self, problem: str) -> str:
        step, accumulated = self.state.global_step, self.args.gradient_accumulation_steps
        draws = [self._sampler().draw(step * accumulated + part) for part in range(accumulated)]
        batch = "; ".join(describe_batch(self.rehearsal.mixture(), draw) for draw in draws)
        checkpoint = last_checkpoint(str(self.args.output_dir))
        return (
            f"training diverged in step {step + 1}: {problem}. Its batch: {batch}. The last good checkpoint is "
            f"{checkpoint or 'the beginning of this stage (none was saved yet)'}; look at these frames, or start in "
            "another --output_dir with a lower learning_rate or max_grad_norm"
        )

    def _retrieve(self, inputs: dict[str, Any], candidates: int) -> dict[str, Any]:
        """The batch with only those of its last samples, the candidates, that the current ones hurt most."""
        first = len(inputs["input_ids"]) - candidates
        current = {name: tensor[:first] for name, tensor in inputs.items()}
        offered = {name: tensor[first:] for name, tensor in inputs.items()}
        model = cast(nn.Module, self.model)
        # Not the schedule's: at its end, what such a step changes of a loss is less than float32 holds.
        rate = self.args.learning_rate
        chosen = most_interfered(model, current, offered, candidates // self.args.mir_candidates, rate, self.optimizer)
        return {name: torch.cat((current[name], offered[name][chosen])) for name in inputs}

    def _terms(self, hidden: Tensor, outputs: Any, replay: ReplayRows) -> dict[str, Tensor]:
        """Each term as it enters the loss, with its weight."""
        anchors, negatives = self.rehearsal.anchors, self.rehearsal.negatives
        if anchors is None or negatives is None:
            raise RuntimeError("no anchors: call `train`, or `prepare_anchors` before `compute_loss`")
        if (
            torch.is_grad_enabled()
            and not hidden.requires_grad
            and not all(term.counterfactual for term in self.terms)
        ):
            raise ValueError(
                f"rac and cmi would change nothing: no layer before tap_layer {self.args.tap_layer} is trained; raise "
                "tap_layer, give earlier layers an adapter (lora_targets), or set lambda_rac and lambda_cmi to 0"
            )
        own, peers = torch.from_numpy(replay.own), torch.from_numpy(replay.peers)
        kept, others = (part[self.rehearsal.are_remembered(part)] for part in (own, peers))
        zero = hidden.new_zeros((), dtype=torch.float32)
        terms: dict[str, Tensor] = {}
        first = len(hidden) - len(own)  # replay samples come last, those of the memory before counterfactual ones
        contrast = negatives(anchors, kept, others, hidden.device)
        rows = slice(first, first + len(kept))
        features = extract_features(
            hidden, outputs.token_roles, rows, longest=contrast.words, pooling=self.args.rac_pooling
        )
        output = policy_output(outputs, slice(first, None))
        if not self.rehearsal.answers_all:
            known, peers_known = (self.rehearsal.are_answered(part) for part in (own, peers))
            # A mask would wait for the device.
            places = known.nonzero().squeeze(1).to(output.device, non_blocking=True)
            own, peers, output = own[known], peers[peers_known], output[places]
        features, answered = features._replace(output=output), replace(contrast, own=own)
        for term in self.terms:
            mine, theirs = (own, peers) if term.counterfactual else (kept, others)
            # The mean over processes shall be the mean over all samples, however they are spread.
            share = len(mine) * self.args.world_size / max(len(mine) + len(theirs), 1)
            nothing = not len(mine) and len(theirs)
            value = zero if nothing else term(features, answered if term.counterfactual else contrast)
            if value is None:
                self._counts[f"{term.name}_skipped"] = self._counts.get(f"{term.name}_skipped", 0) + 1
            else:
                self._note(term.name, value * share)
                terms[term.name] = term.weight * share * value
            if term.network is not None:  # DistributedDataParallel waits for a gradient in every step
                unmoved = sum(parameter.sum() for parameter in term.network.parameters()) * 0.0
                terms[term.name] = terms.get(term.name, zero) + unmoved
        return terms

    # --- the log -----------------------------------------------------------------------------------------------------

    def _logs_this_step(self) -> bool:
        return (self.state.global_step + 1) % max(int(self.state.logging_steps), 1) == 0

    def _trained(self) -> list[nn.Parameter]:
        """What the policy loss trains; the terms' own networks are not of the policy."""
        networks = {id(value) for term in self.terms if term.network for value in term.network.parameters()}
        parameters = cast(nn.Module, self.model).parameters()
        return [value for value in parameters if value.requires_grad and id(value) not in networks]

    def _policy_parts(self, outputs: Any, inputs: Mapping[str, Any], current: int) -> dict[str, Tensor]:
        """The policy loss (see `sample_losses`), shared between the new task's samples and the replayed ones."""
        size = len(inputs["input_ids"])
        parts = {CURRENT: slice(0, current), REPLAY: slice(current, size)}
        if self.rehearsal.regresses_answers:
            answers, labels = outputs.predicted_actions, inputs["actions"]
            means = {
                name: output_distillation_loss(answers[rows], labels[rows], kind="actions")
                for name, rows in parts.items()
            }
        else:
            losses = sample_losses(cast(nn.Module, self.model), inputs, outputs)
            means = {name: losses[rows].mean() for name, rows in parts.items()}
        shares = {name: (rows.stop - rows.start) / size for name, rows in parts.items()}
        return {name: share * means[name] for name, share in shares.items() if share}

    def _note(self, name: str, value: Tensor) -> None:
        value = value.detach().float()
        self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._counts[name] = self._counts.get(name, 0) + 1

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means since the last entry. All processes call this together."""
        if "loss" in logs:
            logs.update(self._drain())
        super().log(logs, start_time)

    def _drain(self) -> dict[str, float]:
        terms = [term.name for term in self.terms]
        parts = [*terms, *(["ewc"] if self._consolidation else [])]
        names = ["policy_loss", *parts]
        if self.args.log_gradients:
            names += [f"grad_norm_{part}" for part in (CURRENT, REPLAY, *parts)]
            names += [f"grad_cosine_{part}" for part in (REPLAY, *parts)]
        zero = torch.zeros((), device=self.args.device)
        rows = [
            (self._sums.get(name, zero), self._counts.get(name, 0), self._counts.get(f"{name}_skipped", 0))
            for name in names
        ]
        sums = torch.stack([torch.as_tensor(value, device=zero.device).float() for row in rows for value in row])
        self._sums, self._counts = {}, {}
        entry: dict[str, float] = {}
        for name, (total, count, skipped) in zip(
            names, self.accelerator.reduce(sums, reduction="sum").view(-1, 3).tolist(), strict=True
        ):
            if count:
                entry[name] = total / count
            if name in terms:
                entry[f"{name}_skipped"] = int(skipped)
        return entry

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Parameters that weight decay is for: the adapter's (or the base's), not those of the terms' networks."""
        names: list[str] = super().get_decay_parameter_names(model)
        return [name for name in names if not any(f"{TERM_NETWORK.format(term.name)}." in name for term in self.terms)]

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """0: Trainer's estimate counts text tokens alone, and walks through all modules in every step to do so."""
        return 0

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # Trainer writes file after file in place, and removes the checkpoint before by its date: a kill in between
        # could leave none, and a clock set back would make it remove the new one.
        folder = Path(str(self.args.output_dir))
        if self.args.should_save:
            shutil.rmtree(folder / STAGING, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._staging = str(folder / STAGING)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = None
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            name = f"checkpoint-{self.state.global_step}"
            publish_checkpoint(folder / STAGING / name, folder / name)
            keep_newest(folder, self.args.save_total_limit)
        self.accelerator.wait_for_everyone()

    def push_to_hub(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused, as the option of that name is.

        Raises:
            ValueError: always; it says what to use.
        """
        raise ValueError(_NO_PUSH)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model, or of a `PeftModel` the adapter in training. All processes call this together.

        An adapter is written as PEFT writes it: `load_policy(folder, base=...)` reads it. A folder that says by itself
        what it learned and on which base is `adapters.save_adapter`'s.
        """
        # Only that adapter: PEFT would write all of them, and on resume read the frozen ones back.
        if not isinstance(self.model, PeftModel):
            weights = whole_state(cast(nn.Module, self.model))
            if weights is None:
                super().save_model(output_dir, _internal_call)
            elif self.args.should_save:
                self._save(output_dir, dict(weights))
            return
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        name = self.model.active_adapter
        write_adapter_weights(self.model, name, folder, write=self.args.should_save)
        if self.args.should_save:  # so that PEFT, too, can read what lies there
            lora = copy.copy(self.model.peft_config[name])
            lora.base_model_name_or_path = None  # the base is the caller's to name
            lora.save_pretrained(str(folder))
        networks = {name: whole(tensor).contiguous() for name, tensor in self._networks().items()}
        if networks and self.args.should_save:
            save_file(networks, folder / _TERM_WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        model = self.model if model is None else model
        if not isinstance(model, PeftModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        folder = Path(resume_from_checkpoint)
        read_adapter_weights(model, model.active_adapter, folder)
        if self._networks():
            stored = load_file(folder / _TERM_WEIGHTS)
            for term in self.terms:
                if term.network is not None:
                    prefix = f"{term.name}."
                    mine = {key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(prefix)}
                    term.network.load_state_dict(mine)

    def _networks(self) -> dict[str, Tensor]:
        return {
            f"{term.name}.{key}": value
            for term in self.terms
            if term.network is not None
            for key, value in term.network.state_dict().items()
        }


def _steps(config: InfoVLAConfig, samples: int, replayed: int) -> int:
    """Steps of `num_train_epochs` over the current task's samples, beside so many replayed ones in a batch of all."""
    per_step = (config.train_batch_size * config.world_size - replayed) * config.gradient_accumulation_steps
    return math.ceil(config.num_train_epochs * samples / float(per_step))


def _check_kinds(model: Any, args: Any, train_dataset: Any, data_collator: Any) -> None:
    """Name an argument of another kind, before something of it is missed deep inside."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be the model itself, with the adapter to train (adapters.add_adapter), not {_kind(model)}; "
            "model_init is not supported"
        )
    if not isinstance(args, InfoVLAConfig):
        raise TypeError(f"args must be an InfoVLAConfig, got {type(args).__name__}")
    if isinstance(train_dataset, VLACollator):
        raise TypeError("the data comes before the collator here: InfoVLATrainer(model, args, dataset, collator)")
    if not isinstance(train_dataset, ChunkDataset):
        raise TypeError(
            f"train_dataset must be a ChunkDataset, got {_kind(train_dataset)}; "
            "ChunkDataset(frames, collator.pipeline) makes one of the rows of demonstrations"
        )
    if not isinstance(data_collator, VLACollator):
        raise TypeError(
            f"data_collator must be a VLACollator, got {_kind(data_collator)}; "
            "VLACollator(processor, normaliser, model.config) makes one, with the frozen normalisation"
        )


def _check_samples(eval_dataset: Any) -> None:
    for dataset in eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]:
        if isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)):
            raise TypeError(
                f"eval_dataset must hold samples, got the rows of {_kind(dataset)}; "
                "train_dataset.like(frames) makes a ChunkDataset of them"
            )


def _check_chunk(model: nn.Module, data: ChunkDataset) -> None:
    config = base_model(model).config
    if config.decoding == "parallel" and data.chunk != config.num_actions_chunk:
        raise ValueError(
            f"train_dataset has chunks of {data.chunk} actions, the model makes chunks of {config.num_actions_chunk}; "
            "make it by ChunkDataset(..., chunk=policy.chunk_length(model.config))"
        )


def _check_past(memory: Any, past_tasks: Any, learned_by: Any, consolidation: Any) -> None:
    """Name what is no description of past tasks."""
    if memory is not None and not isinstance(memory, ReplayMemory):
        raise TypeError(
            f"memory must be a ReplayMemory, got {_kind(memory)}; ReplayMemory.load(folder) reads one, "
            "ReplayMemory().add(frames) makes one"
        )
    for name, value, of in (("past_tasks", past_tasks, "instruction"), ("learned_by", learned_by, "adapter")):
        if value is not None and not isinstance(value, Mapping):
            raise TypeError(f"{name} must be a mapping, name of a task → {of}, got {_kind(value)}")
    if consolidation is not None and not isinstance(consolidation, Consolidation):
        raise TypeError(
            f"consolidation must be a Consolidation, got {_kind(consolidation)}; Consolidation.load(path, stage=...) "
            "reads one, Consolidation.measure makes one"
        )


def _check_consolidation(
    model: nn.Module, method: str, past_tasks: Mapping[str, str] | None, consolidation: Consolidation | None
) -> None:
    """See that EWC's penalty is given where, and only where, it is used."""
    if consolidation is None:
        if METHODS[method].consolidates and past_tasks:
            raise ValueError(
                f"method={method!r} without consolidation is plain fine-tuning, and there are past tasks: pass "
                "consolidation=Consolidation.measure(model, adapter, frames, collator, ...) of the stage before"
            )
        return
    if not METHODS[method].consolidates:
        raise ValueError(f"consolidation is the penalty of method='ewc', not of {method!r}; leave it out")
    if not isinstance(model, PeftModel):
        raise ValueError("a consolidation is of an adapter's parameters; train an adapter (adapters.add_adapter)")
    consolidation.check(model, model.active_adapter)


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__module__.split('.')[0]}.{type(value).__name__}"


class _StopOnSignal(TrainerCallback):
    """Ends a training after the step in which a signal came, with a checkpoint; all processes after the same step."""

    def __init__(self, trainer: Trainer) -> None:
        self._accelerator = trainer.accelerator
        self.number: int | None = None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        stop = requested_stop() is not None
        if self._accelerator.num_processes > 1:
            if stop:
                self._accelerator.set_trigger()
            stop = self._accelerator.check_trigger()
        if stop:
            self.number = requested_stop() or signal.SIGTERM  # which only another process has seen
            control.should_save = control.should_training_stop = True


class _AskTeachers(TrainerCallback):
    """Asks the teachers when the model lies where it is trained: on its devices, and sharded if it is to be."""

    def __init__(self, trainer: InfoVLATrainer) -> None:
        self._trainer = weakref.ref(trainer)  # which owns this: else both, and the model, would outlive the stage

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if (trainer := self._trainer()) is not None:
            register_fsdp_forward_method(cast(nn.Module, trainer.model), "predict_action")
            trainer.prepare_anchors()
            trainer._keep_vision()

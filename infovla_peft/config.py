"""What can be chosen: the trainer's configuration, the stream's, and the recipe that holds both.

A recipe is a YAML file whose keys are the fields of `StreamConfig` and `InfoVLAConfig`; the command line overrides it.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, InitVar, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, NoReturn, get_type_hints

from transformers import HfArgumentParser, TrainingArguments

from .losses import LOWEST_TEMPERATURE
from .option_checks import check_at_least, check_choices, settle_types
from .reading import read_yaml

BENCHMARK_STATES = 50
"""LIBERO's fixed initial states per task."""


HELP_COMMAND = "`python recipes/continual.py --help`"
"""What says it where no command was given."""


class RecipeError(ValueError):
    """A recipe that cannot be used; the message names the file, the option and the cure."""


class StreamShape(NamedTuple):
    """`Bi-kNm`: i base tasks learned together, then k steps of m new tasks each."""

    base_tasks: int
    steps: int
    tasks_per_step: int

    @property
    def total_tasks(self) -> int:
        return self.base_tasks + self.steps * self.tasks_per_step


def parse_stream(notation: str) -> StreamShape:
    """Read the paper's notation of a task stream.

    Raises:
        ValueError: the text is not of the form `Bi-kNm` with k, m ≥ 1.

    >>> parse_stream("B5-5N1")
    StreamShape(base_tasks=5, steps=5, tasks_per_step=1)
    >>> parse_stream("B3-2N1").total_tasks
    5
    """
    match = re.fullmatch(r"[Bb]([0-9]{1,4})-([0-9]{1,4})[Nn]([0-9]{1,4})", notation.strip())
    shape = StreamShape(*map(int, match.groups())) if match else None
    if shape is None or shape.steps < 1 or shape.tasks_per_step < 1:
        raise ValueError(
            f"unknown stream {notation!r:.80}: write Bi-kNm, i base tasks and then k ≥ 1 steps of m ≥ 1 new tasks "
            "each, for example B3-2N1 (3 base tasks, then 2 steps of 1) or B0-5N1"
        )
    return shape


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


NOT_COMPILED = (
    "{} is not supported: a model compiled as a whole leaves out the hook that reads the tapped layer; set "
    "torch_compile alone, which compiles block by block"
)


_SETS_OPTIONS: dict[str, dict[str, Any]] = {
    "infovla_paper": {
        "teacher": "previous", "cmi_mode": "paper", "anchor_bank": 0, "near_duplicate_window": 0,
        "rac_targets": "hard", "rac_center": False,
    },
    "der++": {"teacher": "auto"},
    "lwf": {"teacher": "previous"},
    "ewc": {"adapter_init": "continue"},
    "single_task": {"adapter_init": "fresh"},
    "merge": {"adapter_init": "fresh"},
}  # fmt: skip
"""What a method has, whatever is given."""


@dataclass(repr=False)  # TrainingArguments' own masks tokens
class InfoVLAConfig(TrainingArguments):
    r"""Configuration of [`InfoVLATrainer`]: everything of `TrainingArguments`, and the following.

    > Parameters that control the method

    Args:
        method: what is added to plain fine-tuning (see `methods.py`). `sequential`: nothing. `er`: experience replay.
            `infovla`: replay + counterfactual frames + RAC + CMI + output. `infovla_paper`: replay + RAC + CMI as the
            paper has them, on LoRA; this sets `teacher="previous"`, `cmi_mode="paper"`, `rac_targets="hard"`,
            `rac_center=False`, `anchor_bank=0` and `near_duplicate_window=0`. `der++` sets `teacher="auto"`, `lwf`
            sets `teacher="previous"`, `ewc` `adapter_init="continue"`, `single_task` and `merge`
            `adapter_init="fresh"`. Another value that was given for one of these is warned of.
        lambda_rac: weight λ1 of the replay-anchor contrastive term, ≥ 0; 0 leaves it out. Default: 0.02; with CMI it
            adds 4.2 points to λ3 = 0.3 alone in Bench-S from one base (six pairs), −0.8 from another (three), −2.5 to
            +5.0 on validation states (eleven); at 0.1 a tiny base did not learn a task with a new object (one seed;
            recipes/EXPLORED.md).
            `infovla_paper`: 0.1 (paper, §5.1).
        lambda_cmi: weight λ2 of the cross-modal mutual information term, ≥ 0; 0 leaves it out. Default: as lambda_rac.
        lambda_output: weight λ3 of the distance to the teacher's answers, ≥ 0; 0 leaves it out. Default: 0.3;
            0.1 keeps recent tasks less well, 1 learns new ones less well (the same runs).
        rac_targets: `hard` = Eq. 1; `soft` = the teacher's own similarities, so that the term is 0 where the student
            equals the teacher (Eq. 1 is not); see `losses.replay_anchor_contrastive_loss`. Default: soft; with `hard`
            a tiny base ended 1.4 points lower, which chance can make (one seed, recipes/EXPLORED.md).
        rac_center: subtract the mean anchor of the negatives from all features of RAC, which otherwise lie in a narrow
            cone. Default: on; off, a tiny base ended 0.7 points higher, which chance can make (one seed,
            recipes/EXPLORED.md).
        rac_pooling: what RAC contrasts, of the hidden states of `tap_layer`: None = the mean over the positions that
            predict actions; the last token of the `prompt` before those positions, or the mean over all patches
            (`vision`). The paper says "fused embedding"; in a causal language model patches have not seen the
            instruction. With `prompt` a tiny base ended 3.5 points lower, with `vision` 0.7 higher, which chance can
            make (one seed each, recipes/EXPLORED.md).
        cmi_mode: `infonce`, `relational` or `paper`; see `losses.cross_modal_mi_from_summaries`. Default: relational;
            `infonce` did no worse, within chance (three seeds of two tasks, recipes/EXPLORED.md).
        temperature: τ ≥ 1e-6 of both terms. The paper states none. Default: 0.5, which on a tiny base stands less in
            the way of what is learned than 0.1 (recipes/EXPLORED.md). `infovla_paper`: 0.1, which is unverified.
        teacher: `base` = the base model, adapters off: its features for all of the memory, its answers on the tasks
            that it has learned itself; `auto` = the base for its own tasks and, for a task learned later, the frozen
            adapter that learned it; `previous` = the adapter of stage k−1, frozen (the paper's). Default: auto, which
            ends higher in Bench-S than base (two seeds).
        tap_layer: layer whose hidden states are the features, counted as in `hidden_states` (-1 = last, after the
            final norm). The paper's "layer that fuses" has no counterpart in a causal language model. Of a tiny base's
            three layers the first kept less in Bench-S than the last (two seeds); unverified for larger ones.
        anchor_bank: number of stored anchors (at most; chosen once per stage) that are the negatives of RAC and CMI,
            so that the cost of a step does not grow with the number of tasks. 0: the other replay samples of the
            mini-batch, as in Eq. 1. Default: 1024; with 128 a tiny base ended 1.4 points lower, which chance can make
            (one seed, recipes/EXPLORED.md).
        near_duplicate_window: frames of one trajectory at most this far apart are no negatives of each other. Default:
            the length of an action chunk; with 0 a tiny base ended 2.1 points lower, which chance can make (one seed,
            recipes/EXPLORED.md).

    > Parameters of other methods

    Args:
        lambda_ewc: weight of EWC's penalty, ≥ 0. Default: 1e5, measured on the tiny base (recipes/EXPLORED.md,
            "The weight of EWC"). 56 / 0.06, about 1000, would make a negative log-likelihood (Laplace) of the policy
            loss, a mean L1 distance of 56 numbers that ends near 0.06; that keeps nothing there.
        ewc_samples: frames per task that estimate the Fisher information (of a base's tasks on
            average: they are drawn together), ≥ 1. Unverified.
        ewc_decay: γ in [0, 1] of online EWC; 1 forgets nothing. Unverified.
        mir_candidates: MIR draws this many candidates per replay sample, ≥ 1. Unverified.
        merge_weight: w of each adapter's update in the merged one. Default: 1, task arithmetic's sum. Choose it by
            `recipes/merge_weight.py`: on the tiny base 0.1 ends highest, and there it is the base that is left.
        merge_rank: rank of the merged adapter, ≥ 0: the nearest to the sum (`svd`). Default: 0, the sum
            itself (`cat`), whose rank grows with the tasks.

    > Parameters that control what is watched of a training

    Args:
        log_gradients: log how strongly each part of the loss pulls (`grad_norm_*`) and whether against the new task
            (`grad_cosine_*`, below 0: it does), in the steps that have a log entry, see `conflict.py`. There it costs
            one more backward pass per part; it changes nothing that is trained. With several processes, the mean of
            what each finds in its own samples. Not with `torch_compile`, FSDP or DeepSpeed.
        grad_norm_limit: a training stops, before the step is made, when the norm of its gradient (before clipping)
            exceeds this, or when loss or norm are not finite; > 0. Unverified.

    > Parameters that control the replay memory

    Args:
        replay_fraction: share of each batch drawn from the memory, in [0, 1). Default: 0.5; with 0.375 a tiny base
            kept less and learned no more (two seeds, recipes/EXPLORED.md).
        replay_balance: how replay samples are spread over past tasks. `task`: evenly. `stage`: evenly over the stages
            that learned them, the base being one, so that a task learned in few steps is replayed more often than one
            of the base's. Default: task; with `stage` a tiny base lost whole tasks of its own (recipes/EXPLORED.md).
        anchor_views: augmented views of each replayed frame for which anchors are kept, ≥ 1. The first of a memory
            frame is the frame itself, so 1 means that memory samples are not augmented while anchors are in use.
            Bench-S has 4, which asks the teacher four times as often; with 1 a tiny base ended 2.8 points lower, which
            chance can make (one seed, recipes/EXPLORED.md).
        counterfactual_share: share of the replay samples that are frames of the current task under the instruction of
            an old one, the teacher's answer being the label; in [0, 1], 0 = none. All are where nothing of the memory
            is replayed (`lwf`, or an empty memory), unless it is 0. Default: 0.5; with 0 a tiny base
            kept less of its tasks, with 0.25 it kept and learned as much (two seeds each, recipes/EXPLORED.md).
        counterfactual_frames: that many such pairs of frame and instruction are chosen per stage. Unverified;
            Bench-S has 1024.

    > Parameters that control augmentation

    Args:
        image_shift: random shift of the images by up to this many pixels of the model's input, edges repeated. Applied
            to samples of the current task, and to replay samples that have no anchors in use. Default: 4, for an
            input of 112 pixels; with 0 a tiny base ended 0.7 points lower, and 1 did no worse, which chance can make
            (one seed each, recipes/EXPLORED.md).
        proprio_noise: standard deviation of Gaussian noise on the normalised proprioception of the same samples. Off
            by default, as in OpenVLA-OFT; with 0.02 a tiny base ended 1.4 points lower, which chance can make (two
            seeds, recipes/EXPLORED.md).
        cache_images: decode all frames once and keep them in memory as uint8, at the model's input size, if that takes
            no more than 1 GiB per process; larger sets are decoded batch by batch (`infovla bench data`).
        cache_vision_features: run the vision tower on the replayed frames once per stage and keep what it makes of
            them on the disk. Needs a tower without adapters (`lora_targets`), and replay samples that are not
            augmented anew.
        torch_compile: compile the transformer blocks, one by one, while training (see `compilation.py`). Not with FSDP
            or DeepSpeed; on a CPU it needs a C++ compiler.

    > Parameters that control the adapter

    Args:
        adapter_init: `continue` = start from the previous task's adapter, as the paper trains one model on and on;
            `fresh` = from zero.
        lora_r: rank. OpenVLA's fine-tuning recipe.
        lora_alpha: scale, the update being (alpha / r) · B·A. OpenVLA's fine-tuning recipe.
        lora_dropout: in [0, 1). OpenVLA's fine-tuning recipe.
        lora_targets: `all-linear` = every linear layer that receives a gradient, action head included, `lm_head` not;
            otherwise names of modules, separated by commas.
    """

    _argument_group_name: ClassVar[str] = "training"

    method: Literal[
        "sequential",
        "er",
        "infovla",
        "infovla_paper",
        "der++",
        "mir",
        "ewc",
        "lwf",
        "multitask",
        "single_task",
        "merge",
    ] = _option(
        "infovla",
        "What is added to plain fine-tuning: sequential (nothing), er (replay), infovla (replay, counterfactual "
        "frames, RAC, CMI, output), infovla_paper (as in the paper), der++, mir, ewc, lwf, multitask (all is kept), "
        "single_task (an adapter per task, chosen by the task), merge (those merged).",
    )
    lambda_rac: float = _option(
        None, "Weight of the replay-anchor contrastive term; 0 leaves it out. Default: 0.02; infovla_paper: 0.1."
    )
    lambda_cmi: float = _option(
        None, "Weight of the cross-modal mutual information term; 0 leaves it out. Default: 0.02; infovla_paper: 0.1."
    )
    lambda_output: float = _option(0.3, "Weight of the distance to the teacher's answers; 0 leaves it out.")
    rac_targets: Literal["hard", "soft"] = _option(
        "soft", "What RAC contrasts for: hard = the sample's own anchor (Eq. 1), soft = the teacher's similarities."
    )
    rac_center: bool = _option(True, "Subtract the mean of the negatives' anchors from the features of RAC.")
    rac_pooling: Literal["prompt", "vision"] | None = _option(
        None, "RAC contrasts the prompt's last token, or the mean of the patches; default: the mean where actions are."
    )
    cmi_mode: Literal["infonce", "relational", "paper"] = _option("relational", "Estimator of the cross-modal term.")
    temperature: float = _option(None, "Temperature of both terms. Default: 0.5; infovla_paper: 0.1.")
    teacher: Literal["base", "auto", "previous"] = _option(
        "auto",
        "Frozen teacher: base (adapters off; its answers are kept on its own tasks alone), auto (the base for its own "
        "tasks, for a later one the adapter that learned it) or previous (the adapter of the stage before).",
    )
    tap_layer: int = _option(-1, "Layer whose hidden states are the features; -1 = last, after the final norm.")
    anchor_bank: int = _option(1024, "Stored anchors used as negatives; 0 = those of the mini-batch, as in Eq. 1.")
    near_duplicate_window: int = _option(
        8, "Frames of one trajectory at most this far apart are no negatives of each other."
    )

    replay_fraction: float = _option(0.5, "Share of each batch drawn from the memory, in [0, 1).")
    replay_balance: Literal["task", "stage"] = _option(
        "task", "Replay samples are spread evenly over past tasks (task) or over the stages that learned them (stage)."
    )
    anchor_views: int = _option(
        1, "Views of each memory frame that have anchors: the frame itself and anchor_views - 1 shifted ones."
    )
    counterfactual_share: float = _option(
        0.5, "Share of the replay samples that are frames of the current task under an old instruction."
    )
    counterfactual_frames: int = _option(2048, "Pairs of frame and old instruction that are chosen per stage.")

    lambda_ewc: float = _option(1e5, "Weight of the penalty of `ewc`.")
    ewc_samples: int = _option(256, "Frames per task from which `ewc` estimates the Fisher information.")
    ewc_decay: float = _option(1.0, "Factor of earlier stages' Fisher information at each stage, in [0, 1].")
    mir_candidates: int = _option(3, "`mir` chooses among that many times as many samples as it replays.")
    merge_weight: float = _option(1.0, "Weight of each adapter in what `merge` evaluates.")
    merge_rank: int = _option(0, "Rank of what `merge` evaluates, by SVD; 0 = the sum of all ranks, which is exact.")

    log_gradients: bool = _option(
        False, "Log the gradient of each part of the loss: its norm, and its cosine with the new task's."
    )
    grad_norm_limit: float = _option(1e6, "Stop before a step whose gradient norm exceeds this, or is not finite.")

    image_shift: int = _option(4, "Random image shift in pixels of the model's input; 0 turns it off.")
    proprio_noise: float = _option(0.0, "Standard deviation of noise on the normalised proprioception.")
    cache_images: bool = _option(True, "Decode all frames once and keep them in memory, if 1 GiB is enough.")
    cache_vision_features: bool = _option(
        False, "Keep a frozen vision tower's features of the replayed frames on the disk, once per stage."
    )

    adapter_init: Literal["continue", "fresh"] = _option(
        "continue", "Start a new adapter from the previous task's (continue) or from zero (fresh)."
    )
    lora_r: int = _option(32, "Rank of the adapter.")
    lora_alpha: int = _option(16, "Scale of the adapter: its update is (alpha / r) B A.")
    lora_dropout: float = _option(0.0, "Dropout in front of the adapter.")
    lora_targets: str = _option("all-linear", "all-linear, or names of modules separated by commas.")

    # Other defaults than TrainingArguments'.
    learning_rate: float = _option(5e-4, "The initial learning rate. Default: OpenVLA's fine-tuning recipe.")
    logging_steps: float = _option(10, "Log every so many steps; a number below 1 is a share of all steps.")
    report_to: list[str] | None = field(
        default_factory=lambda: ["none"],
        metadata={"help": "Trackers: tensorboard, wandb, trackio, jsonl or others of Trainer, several too; or none."},
    )
    remove_unused_columns: bool = _option(False, "Must stay False: batches carry more than the model's arguments.")

    _made_for: InitVar[str | None] = None
    """The method for which the options above were resolved: `dataclasses.replace` passes it on with them."""

    @property
    def n_gpu(self) -> int:
        """At most one: several GPUs are several processes (`accelerate launch`), never `nn.DataParallel`."""
        return min(int(super().n_gpu), 1)

    def __getstate__(self) -> dict[str, Any]:
        # Trainer pickles its configuration beside what it saves, and pushes both.
        return {**self.__dict__, "hub_token": None}

    def __post_init__(self, _made_for: str | None) -> None:
        if _made_for not in (None, self.method) and (_made_for in _SETS_OPTIONS or self.method == "infovla_paper"):
            raise ValueError(
                f"dataclasses.replace would keep what method={_made_for!r} has set (teacher, weights, ...); make a "
                f"new InfoVLAConfig(method={self.method!r}, ...) of the options that you have chosen"
            )
        self.__dict__["_made_for"] = self.method
        for name in ("torch_compile_backend", "torch_compile_mode"):
            if getattr(self, name):
                raise ValueError(NOT_COMPILED.format(name))  # before it is written into the environment
        compile_blocks, self.torch_compile = self.torch_compile, False  # Trainer would compile the model as a whole
        self.report_to = list(self.report_to) if isinstance(self.report_to, tuple) else self.report_to or ["none"]
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.torch_compile = compile_blocks
        targets: Any = self.lora_targets
        if isinstance(targets, (list, tuple)):  # as PEFT's `target_modules` may be
            self.lora_targets = ",".join(map(str, targets))
        for name, default in (("lambda_rac", 0.02), ("lambda_cmi", 0.02), ("temperature", 0.5)):
            if getattr(self, name) is None:
                setattr(self, name, 0.1 if self.method == "infovla_paper" else default)
        settle_types(self)
        self._settle_method()
        check_at_least(
            self, 0, "lambda_rac", "lambda_cmi", "lambda_output", "anchor_bank", "near_duplicate_window", "image_shift"
        )
        check_at_least(self, 0, "proprio_noise", "lambda_ewc", "merge_rank")
        if not self.grad_norm_limit > 0:
            raise ValueError(f"grad_norm_limit must be above 0, got {self.grad_norm_limit}")
        check_at_least(self, 1, "lora_r", "lora_alpha", "anchor_views", "counterfactual_frames")
        check_at_least(self, 1, "ewc_samples", "mir_candidates")
        check_choices(self)
        if not math.isfinite(self.merge_weight):
            raise ValueError(f"merge_weight must be a finite number, got {self.merge_weight}")
        check_at_least(self, LOWEST_TEMPERATURE, "temperature")
        check_at_least(self, 1, "gradient_accumulation_steps")
        if self.max_steps <= 0 and not self.num_train_epochs > 0:
            raise ValueError(f"num_train_epochs must be above 0, or max_steps be set, got {self.num_train_epochs}")
        for name in ("save", "eval", "logging"):
            if getattr(self, f"{name}_strategy") == "epoch":
                raise ValueError(
                    f"{name}_strategy must not be epoch: Trainer's epoch is the whole of a training here, so it would "
                    f"mean once, at its end; set {name}_strategy to steps, and {name}_steps"
                )
        if self.log_gradients and self.torch_compile:
            raise ValueError("log_gradients goes through a graph several times, torch_compile once: leave one out")
        if self.rac_center and self.lambda_rac and self.method == "infovla" and not self.anchor_bank:
            raise ValueError(
                "rac_center subtracts the mean of stored anchors: set anchor_bank above 0, or rac_center to false"
            )
        for name in ("replay_fraction", "lora_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        for name in ("counterfactual_share", "ewc_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if self.save_only_model:
            raise ValueError(
                "save_only_model must stay False: a training that goes on without its optimiser, schedule and random "
                "numbers is another one; set save_strategy to no if no checkpoints are wanted"
            )
        if self.load_best_model_at_end or self.metric_for_best_model:
            raise ValueError(
                "load_best_model_at_end and metric_for_best_model are not supported: which checkpoint of a policy is "
                "the best, rollouts say, not a loss; evaluate the checkpoints that you keep (save_total_limit)"
            )
        for name, neutral in (("label_smoothing_factor", 0.0), ("dataloader_drop_last", False)):
            if getattr(self, name) != neutral:
                raise ValueError(f"{name} must stay {neutral}: batches and losses are made here, without it")
        if self.auto_find_batch_size:
            raise ValueError(
                "auto_find_batch_size must stay False: what it retries goes on from weights that are trained already, "
                "with other batches; lower per_device_train_batch_size and raise gradient_accumulation_steps"
            )
        if self.train_sampling_strategy != "random":
            raise ValueError("train_sampling_strategy must stay random: batches are drawn here, task by task")
        if self.ignore_data_skip:
            raise ValueError("ignore_data_skip must stay False: a training that goes on would see other batches")
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns must stay False: batches carry more than the model's arguments")
        if self.tap_layer == 0:
            raise ValueError("tap_layer 0 is the embeddings, which no adapter changes; use 1 … L, or -1 for the last")

    def _settle_method(self) -> None:
        """Give the options that the method sets their values, and say which of those that were given is not used."""
        if self.method == "lwf" and not self.counterfactual_share:
            raise ValueError(
                "lwf is its counterfactual frames: set counterfactual_share above 0, or method=sequential"
            )
        settled = _SETS_OPTIONS.get(str(self.method), {})
        given = {name: getattr(self, name) for name in settled}
        defaults = {each.name: each.default for each in fields(type(self))}
        unused = [
            f"{name}={settled[name]!r} instead of {value!r}"
            for name, value in given.items()
            if value not in (settled[name], defaults[name])
        ]
        if unused:
            warnings.warn(f"method={self.method!r} has {', '.join(unused)}", stacklevel=4)
        for name, value in settled.items():
            setattr(self, name, value)


@dataclass
class StreamConfig:
    """The stream: which tasks in which order, their demonstrations, the base, and how the policy is evaluated.

    The run's folder and seed are `InfoVLAConfig.output_dir` and `InfoVLAConfig.seed`; what is said there of optimising
    holds for the adapter stages, and what is named `base_*` here replaces it in the base stage of a tiny base.

    Where the defaults come from: `stream` is LIBERO-Goal's shortest in which a group of tasks and single ones follow
    each other; `memory_trajectories` and `stage_steps` are the paper's; `eval_episodes`, `open_loop_steps` (a whole
    chunk) and the step caps are OpenVLA-OFT's evaluation in LIBERO, with 20 rollouts in place of its 50. The tiny base
    (`tiny_*`, `base_*`, `image_size`, `demonstrations`, `demonstration_noise`) is the smallest that was seen to learn
    LIBERO-Goal's tasks in minutes on two cores; what was tried is in recipes/EXPLORED.md, the rest is unverified.
    """

    _argument_group_name: ClassVar[str] = "stream"

    suite: Literal["libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90"] = _option(
        "libero_goal", "LIBERO suite."
    )
    stream: str = _option("B3-2N1", "Bi-kNm: i base tasks, then k steps of m new tasks each.")
    tasks: list[str] | None = field(
        default=None, metadata={"help": "Tasks in the order of learning, by number or name; default: 0, 1, 2, ..."}
    )
    base_model: str = _option(
        "tiny", "Hub id or folder of an OpenVLA checkpoint, or tiny: build a small one and train it on the base tasks."
    )
    quantization: Literal["none", "nf4"] = _option(
        "none", "How the frozen base is held: none, or nf4 = in 4 bits by bitsandbytes (QLoRA), the teacher with it."
    )
    unnorm_key: str | None = _option(None, "Key of the base's statistics to normalise with; default: the suite's.")

    assets: Literal["auto", "official", "primitive"] = _option(
        "auto", "LIBERO's own assets, the package's stand-ins, or official where they are found."
    )
    assets_folder: str | None = _option(None, "Folder of the official assets.")
    image_size: int = _option(128, "Side of the rendered and recorded images in pixels.")
    cameras: list[str] = field(
        default_factory=lambda: ["agentview"],
        metadata={"help": "Cameras the policy sees: agentview, robot0_eye_in_hand."},
    )
    center_crop: bool = _option(
        False,
        "Show the model the central nine tenths of each image: for checkpoints trained with OpenVLA's random crops.",
    )
    renderer: Literal["fast", "exact"] = _option("fast", "fast: no reflections, no multisampling. exact: LIBERO's.")

    demonstrations: int = _option(40, "Scripted demonstrations per task.")
    demonstrations_folder: str | None = _option(None, "Where they are kept; default: inside the run's folder.")
    demonstrations_source: str | None = _option(
        None,
        "Demonstrations to learn from in place of scripted ones: LIBERO's HDF5 files, a LeRobot data set v3, or a "
        "folder recorded before; a folder, or a Hub id user/name. The first `demonstrations` of each task are taken.",
    )
    demonstrations_columns: list[str] | None = field(
        default=None,
        metadata={"help": "Columns of that source by other names than usual: image=observation.images.top ..."},
    )
    demonstrations_rotate: bool | None = _option(
        None, "Turn its pictures by 180 degrees; default: as the format needs to be upright."
    )
    drop_noops: bool = _option(False, "Leave out its actions that do nothing, by OpenVLA's rule.")
    demonstrations_observations: Literal["auto", "before", "after"] = _option(
        "auto",
        "Whether frame t of LIBERO's HDF5 files was seen before action t (regenerated files) or after it (LIBERO's "
        "own); auto finds it out.",
    )
    demonstrations_gripper: list[float] | None = field(
        default=None,
        metadata={
            "help": "What the last number of its actions is for an open and for a closed gripper, such as 1 0; "
            "default: LIBERO's, -1 1."
        },
    )
    demonstration_noise: float = _option(0.1, "Noise on the executed, not on the recorded, actions.")
    demonstration_workers: int = _option(0, "Processes that record; 0 = one per core.")
    memory_trajectories: int = _option(1, "Trajectories kept of each past task. Paper, section 4.1.")

    base_steps: int = _option(2500, "Optimiser steps of the base stage (tiny base only).")
    base_learning_rate: float = _option(6e-4, "Learning rate of the base stage.")
    base_batch_size: int = _option(48, "Batch size per device of the base stage.")
    stage_steps: int = _option(600, "Optimiser steps of each adapter stage. Paper, section 5.1.")

    eval_episodes: int = _option(20, "Rollouts per task and stage, from the first of the 50 fixed initial states.")
    final_eval_episodes: int | None = _option(None, "Rollouts per task after the last stage; default: eval_episodes.")
    eval_first_state: int = _option(0, "First of the initial states; choices are made on others than are reported.")
    eval_workers: int = _option(0, "Processes that simulate; 0 = one per core.")
    open_loop_steps: int = _option(8, "Actions executed of each predicted chunk.")
    rollout_max_steps: int | None = _option(None, "Step cap of a rollout; default: the suite's own.")
    videos_per_task: int = _option(2, "MP4s per task and stage, failures first.")
    analyse: bool = _option(
        False, "Also analyse what was kept: affinity maps, CKA, whether it listens; analysis.json, and in the report."
    )

    tiny_image_size: int = _option(96, "Tiny base: side of its input images in pixels.")
    tiny_patch_size: int = _option(12, "Tiny base: side of a patch in pixels.")
    tiny_vision_width: int = _option(128, "Tiny base: width of its vision transformer.")
    tiny_vision_depth: int = _option(4, "Tiny base: blocks of its vision transformer.")
    tiny_hidden_size: int = _option(128, "Tiny base: width of its language model.")
    tiny_layers: int = _option(4, "Tiny base: layers of its language model.")
    tiny_heads: int = _option(4, "Tiny base: attention heads of both.")

    def __post_init__(self) -> None:
        settle_types(self)
        check_choices(self)
        shape = parse_stream(self.stream)
        if self.base_model == "tiny" and shape.base_tasks == 0:
            raise ValueError(
                f"stream {self.stream} has no base tasks, but a tiny base must be trained on some; "
                "use at least B1, or a checkpoint as base_model"
            )
        if self.demonstrations_source is None:
            names = ("columns", "rotate", "observations", "gripper")
            for name in ("drop_noops", *(f"demonstrations_{name}" for name in names)):
                if getattr(self, name) not in (None, False, "auto"):
                    raise ValueError(f"{name} applies only with demonstrations_source; set that, or leave {name} out")
        elif self.demonstrations_folder is not None:
            raise ValueError("give demonstrations_source (what is there) or demonstrations_folder (to record into)")
        if self.tasks is not None and len(self.tasks) != shape.total_tasks:
            raise ValueError(
                f"stream {self.stream} needs {shape.total_tasks} tasks, but `tasks` names {len(self.tasks)}"
            )
        if self.tasks is not None and len(set(self.tasks)) != len(self.tasks):
            raise ValueError(f"`tasks` names a task twice: {self.tasks}")
        check_at_least(self, 1, "tiny_image_size", "tiny_patch_size", "tiny_vision_width", "tiny_vision_depth")
        check_at_least(self, 1, "tiny_hidden_size", "tiny_layers", "tiny_heads")
        if self.tiny_image_size % self.tiny_patch_size:
            raise ValueError(
                f"tiny_image_size {self.tiny_image_size} is no multiple of tiny_patch_size {self.tiny_patch_size}"
            )
        if self.analyse and self.demonstrations <= self.memory_trajectories:
            raise ValueError(
                "analyse looks at demonstrations that are not in the replay memory, so there must be more of them: "
                f"demonstrations is {self.demonstrations}, memory_trajectories {self.memory_trajectories}"
            )
        check_at_least(
            self,
            1,
            "image_size",
            "demonstrations",
            "base_steps",
            "base_batch_size",
            "stage_steps",
            "open_loop_steps",
            "eval_episodes",
        )
        check_at_least(
            self,
            0,
            "demonstration_noise",
            "demonstration_workers",
            "eval_first_state",
            "memory_trajectories",
            "eval_workers",
            "videos_per_task",
        )
        for name in ("final_eval_episodes", "rollout_max_steps"):
            if getattr(self, name) is not None:
                check_at_least(self, 1, name)
        for name in ("eval_episodes", "final_eval_episodes"):
            last = self.eval_first_state + (getattr(self, name) or 0)
            if last > BENCHMARK_STATES:
                raise ValueError(
                    f"LIBERO has {BENCHMARK_STATES} initial states per task, but {name} {getattr(self, name)} from "
                    f"eval_first_state {self.eval_first_state} on would need {last}"
                )

    @property
    def shape(self) -> StreamShape:
        return parse_stream(self.stream)

    def episodes(self, stage: int) -> int:
        """Rollouts per task after a stage, 0 = base.

        >>> config = StreamConfig(stream="B3-2N1", eval_episodes=10, final_eval_episodes=20)
        >>> [config.episodes(stage) for stage in range(3)]
        [10, 10, 20]
        """
        last = stage == self.shape.steps
        return self.final_eval_episodes if last and self.final_eval_episodes is not None else self.eval_episodes


def load_recipe(
    path: str | Path | Mapping[str, Any] | None,
    argv: Sequence[str] = (),
    *,
    prog: str | None = None,
    description: str | None = None,
    source: str | None = None,
) -> tuple[StreamConfig, InfoVLAConfig]:
    """Read a recipe and the command-line arguments that override it.

    Args:
        path: YAML file with fields of `StreamConfig` and `InfoVLAConfig`, or what such a file holds; None for the
            defaults.
        argv: arguments such as `["--lora_r", "8", "--no_rac_center"]`. `--help` prints every option and exits.
        prog, description: of `--help`.
        source: what messages call the recipe; the path, if there is one.

    Raises:
        FileNotFoundError: no such file.
        RecipeError: the file is no YAML mapping; an unknown or unusable option (the message names near ones).
    """
    types: list[Any] = [StreamConfig, InfoVLAConfig]
    parser = _RecipeParser(types, prog=prog, description=description, allow_abbrev=False)
    flags: list[str] = []
    if source is None:
        source = "recipe" if path is None or isinstance(path, Mapping) else str(path)
    help_command = "--help" if prog else HELP_COMMAND
    if path is not None:
        recipe = path if isinstance(path, Mapping) else _read_recipe(Path(path))
        check_option_names(recipe, source, help_command)
        flags = _flags(recipe, source)
    try:
        stream, training, unknown = parser.parse_args_into_dataclasses(
            [*flags, *argv], return_remaining_strings=True, look_for_args_file=False
        )
    # TrainingArguments looks into files, packages and devices that its options name, and raises what they raise.
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, OSError, ImportError) as error:
        raise RecipeError(f"{source}: {error!s:.500}; {help_command} says what each option takes") from error
    behind = [word for word in (*unknown, *(training.report_to or ())) if str(word).endswith((".yaml", ".yml"))]
    if behind and not behind[0].startswith("-"):
        raise RecipeError(f"{behind[0]:.200} stands behind the options; a recipe comes first, or as --config")
    if unknown:
        option = unknown[0].split("=")[0]
        near = _near(option.lstrip("-").replace("-", "_"), help_command)
        raise RecipeError(f"{source}: unknown option {option:.80}{near}")
    if training.max_steps != -1 or training.num_train_epochs != InfoVLAConfig.num_train_epochs:
        raise RecipeError(
            f"{source}: max_steps and num_train_epochs are not used in a stream; set base_steps and stage_steps"
        )
    return stream, training


def resolved_config(stream: StreamConfig, training: InfoVLAConfig) -> dict[str, Any]:
    """Every field of both with its value, ready for YAML or JSON; secrets are masked."""
    values: dict[str, Any] = {**asdict(stream), **training.to_dict()}  # type: ignore[no-untyped-call]
    resolved: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return resolved


class _RecipeParser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _read_recipe(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no recipe at {path}")
    content = read_yaml(path, error=RecipeError, cure="write `option: value` lines")
    if content is not None and not isinstance(content, dict):
        raise RecipeError(f"{path} must hold `option: value` lines, not a {type(content).__name__}")
    return content or {}


def check_option_names(recipe: Iterable[object], source: str, help_command: str = HELP_COMMAND) -> None:
    """Raise a RecipeError if one of these is the name of no option; it names near ones."""
    for name in recipe:
        if name not in _option_names():
            raise RecipeError(f"{source}: unknown option {name!r:.80}{_near(str(name), help_command)}")


def _flags(recipe: Mapping[str, Any], source: str) -> list[str]:
    """The recipe as command-line flags, so that both are parsed and checked in the same way."""
    known = _option_names()
    flags: list[str] = []
    for name, value in recipe.items():
        if value is None:
            if known[name] is not None:
                raise RecipeError(
                    f"{source}: {name} has no value; leave the line out to keep {known[name] or 'none'!r}"
                )
        elif isinstance(value, list) and name == "lora_targets":  # as PEFT's `target_modules` may be
            flags.append(f"--{name}={','.join(map(str, value))}")
        elif isinstance(value, list):
            if not _takes_list(name):
                raise RecipeError(f"{source}: {name} takes one value, not a list ({value!s:.80})")
            flags += [f"--{name}", *map(str, value)]
        else:  # one word, so that a value may begin with a dash
            flags.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return flags


def _option_names() -> dict[str, Any]:
    options = {}
    for option in (*fields(StreamConfig), *fields(InfoVLAConfig)):
        options[option.name] = option.default if option.default is not MISSING else ()
    return options


def _takes_list(name: str) -> bool:
    return "list" in str({**get_type_hints(StreamConfig), **get_type_hints(InfoVLAConfig)}[name])


def _near(name: str, help_command: str) -> str:
    near = difflib.get_close_matches(name[:80], _option_names(), n=3)
    hint = f"did you mean {', '.join(near)}? " if near else ""
    return f"; {hint}{help_command} lists all of them"

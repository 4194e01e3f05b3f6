"""The trainer: what moves and what must not, gradients, processes, resuming, precision, the log."""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import weakref
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from tiny_policy import TinyPolicy, tiny_policy
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from infovla_peft import files
from infovla_peft.adapters import activate, adapter_parameters, add_adapter, base_model
from infovla_peft.checkpoints import last_checkpoint
from infovla_peft.config import InfoVLAConfig
from infovla_peft.consolidation import Consolidation
from infovla_peft.data.chunks import ChunkDataset, ReplayRows
from infovla_peft.data.collator import VLACollator
from infovla_peft.data.normalisation import Normaliser
from infovla_peft.loss_log import LossLog
from infovla_peft.memory import Anchors, ReplayMemory
from infovla_peft.methods import METHODS, without_memory
from infovla_peft.report import read_loss_curves
from infovla_peft.teacher import compute_anchors, teacher_mode
from infovla_peft.trainer import InfoVLATrainer

DRAWER, STOVE, BOWL = "open_the_drawer", "turn_on_the_stove", "put_the_bowl_on_the_plate"


def config(folder: Path, **options: Any) -> InfoVLAConfig:
    plain = {
        "use_cpu": True, "max_steps": 4, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "lora_r": 4,
        "lora_alpha": 8, "image_shift": 2, "counterfactual_share": 0.0, "lambda_output": 0.0,
        "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True,
        "rac_targets": "hard", "rac_center": False, "lambda_rac": 0.1, "lambda_cmi": 0.1,
    }  # fmt: skip
    return InfoVLAConfig(**{"output_dir": str(folder), **plain, **options})


def old_tasks(policy: TinyPolicy) -> ReplayMemory:
    return ReplayMemory().add(policy.task(DRAWER)).add(policy.task(STOVE))


def adapter_stage(folder: Path, policy: TinyPolicy | None = None, **options: Any) -> InfoVLATrainer:
    """A trainer for a third task, with two in the memory."""
    policy = policy or tiny_policy()
    args = config(folder, **options)
    callbacks = [LossLog(folder / "log.jsonl", 1)]
    model = add_adapter(policy.model, "one", args)
    dataset = policy.dataset.like(policy.task(BOWL))
    return InfoVLATrainer(model, args, dataset, policy.collator, memory=old_tasks(policy), callbacks=callbacks)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def losses(trainer: InfoVLATrainer, name: str = "loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def first_batch(trainer: InfoVLATrainer) -> dict[str, Any]:
    batch: dict[str, Any] = next(iter(trainer.get_train_dataloader()))
    return batch


def test_held_out_samples_have_a_loss(tmp_path: Path) -> None:
    trainer = adapter_stage(tmp_path)
    assert isinstance(trainer.train_dataset, ChunkDataset)
    found = trainer.evaluate(trainer.train_dataset)  # type: ignore[arg-type]
    policy = tiny_policy()
    batch = policy.collator(trainer.train_dataset.__getitems__(range(len(trainer.train_dataset))))
    with torch.inference_mode():
        expected = base_model(cast(nn.Module, trainer.model)).eval()(**batch).loss
    assert found["eval_loss"] == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_a_saved_adapter_is_one_of_peft_s(tmp_path: Path) -> None:
    trainer = adapter_stage(tmp_path / "run", max_steps=2)
    trainer.train()
    trainer.model.peft_config["one"].base_model_name_or_path = "../../base"  # as reading an adapter leaves it
    trainer.save_model(str(tmp_path / "saved"))
    assert "../../base" not in (tmp_path / "saved" / "adapter_config.json").read_text()
    read = PeftModel.from_pretrained(tiny_policy().model, str(tmp_path / "saved"))
    assert isinstance(trainer.model, PeftModel)
    ours = {key.replace(".one.", "."): value for key, value in adapter_parameters(trainer.model, "one")}
    theirs = {key.replace(".default.", "."): value for key, value in adapter_parameters(read, "default")}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert all(parameter.requires_grad for parameter in ours.values())  # writing has frozen nothing


def test_what_is_given_in_another_order_is_named(tmp_path: Path) -> None:
    policy = tiny_policy()
    given: Any = (policy.collator, policy.dataset)
    with pytest.raises(TypeError, match=r"InfoVLATrainer\(model, args, dataset, collator\)"):
        InfoVLATrainer(policy.model, config(tmp_path), *given)
    plain: Any = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(TypeError, match="args must be an InfoVLAConfig, got TrainingArguments"):
        InfoVLATrainer(policy.model, plain, policy.dataset, policy.collator)


# --- what moves and what must not ---


@pytest.mark.parametrize("teacher", ["base", "previous"])
def test_after_two_tasks_the_base_and_the_first_adapter_are_bit_identical(tmp_path: Path, teacher: str) -> None:
    policy = tiny_policy()
    args = config(tmp_path, teacher=teacher, weight_decay=0.1)
    original = snapshot(policy.model)
    memory = ReplayMemory().add(policy.task(DRAWER))
    model = add_adapter(policy.model, "one", args)
    InfoVLATrainer(model, args, policy.dataset.like(policy.task(STOVE)), policy.collator, memory=memory).train()
    first = {name: parameter.detach().clone() for name, parameter in adapter_parameters(model, "one")}
    memory = memory.add(policy.task(STOVE))
    add_adapter(model, "two", args, start_from="one")
    start = {name: parameter.detach().clone() for name, parameter in adapter_parameters(model, "two")}
    trainer = InfoVLATrainer(
        model, args, policy.dataset.like(policy.task(BOWL)), policy.collator, memory=memory, previous_adapter="one"
    )
    trainer.train()
    now = {name.replace(".base_layer.", "."): tensor for name, tensor in base_model(model).state_dict().items()}
    assert all(torch.equal(now[name], tensor) for name, tensor in original.items())
    assert all(torch.equal(parameter, first[name]) for name, parameter in adapter_parameters(model, "one"))
    assert all(not torch.equal(parameter, start[name]) for name, parameter in adapter_parameters(model, "two"))


def test_the_base_stage_trains_all_that_runs(tmp_path: Path) -> None:
    policy = tiny_policy()
    before = snapshot(policy.model)
    trainer = InfoVLATrainer(policy.model, config(tmp_path), policy.dataset, policy.collator)
    trainer.train()
    moved = {name for name, tensor in policy.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name, parameter in policy.model.named_parameters() if parameter.requires_grad}
    assert "language_model.model.embed_tokens.weight" in moved
    assert set(trainer.state.log_history[0]) == {"loss", "policy_loss", "grad_norm", "learning_rate", "epoch", "step"}


@pytest.mark.parametrize(
    ("method", "term", "cmi_mode"),
    [
        *[("infovla", term, mode) for term in ("rac", "cmi") for mode in ("infonce", "relational")],
        ("infovla", "output", "infonce"),
        *[("infovla_paper", term, "paper") for term in ("rac", "cmi")],
    ],
)
def test_the_gradient_of_each_term_reaches_the_adapter_and_nothing_else(
    tmp_path: Path, method: str, term: str, cmi_mode: str
) -> None:
    weights = {f"lambda_{name}": float(term == name) for name in ("rac", "cmi", "output")}
    trainer = adapter_stage(tmp_path, method=method, cmi_mode=cmi_mode, **weights)
    model: Any = trainer.model
    for _, parameter in adapter_parameters(model, "one"):
        nn.init.normal_(parameter, 0, 0.1)  # B = 0 would hide the gradient of A
    trainer.prepare_anchors()
    batch = first_batch(trainer)
    policy_part = model(**{key: value for key, value in batch.items() if key != "replay"}).loss
    (trainer.compute_loss(model, batch) - policy_part).backward()
    for name, parameter in model.named_parameters():
        # The action head comes after the tapped layer, and makes the answers.
        reached = ".lora_" in name and (term == "output" or "action_head" not in name)
        has_gradient = parameter.grad is not None and bool(parameter.grad.abs().max() > 0)
        assert has_gradient == (reached or "cmi_network" in name), name
    assert all(tensor.grad is None for tensor in trainer.prepare_anchors().tensors().values())  # type: ignore[union-attr]


def test_only_replay_samples_have_terms(tmp_path: Path) -> None:
    trainer = adapter_stage(tmp_path)
    trainer.prepare_anchors()
    batch = first_batch(trainer)
    model: Any = trainer.model
    expected = trainer.compute_loss(model, batch) - model(**{k: v for k, v in batch.items() if k != "replay"}).loss
    moved = {**batch, "pixel_values": batch["pixel_values"].clone()}
    moved["pixel_values"][: len(moved["pixel_values"]) // 2] = 0  # the current task's samples come first
    changed = trainer.compute_loss(model, moved) - model(**{k: v for k, v in moved.items() if k != "replay"}).loss
    torch.testing.assert_close(changed, expected, atol=1e-6, rtol=1e-5)


def test_one_forward_of_the_student_and_none_of_the_teacher_per_step(tmp_path: Path) -> None:
    trainer = adapter_stage(tmp_path, max_steps=5)
    trainer.prepare_anchors()
    calls: list[bool] = []
    model: Any = trainer.model
    base_model(model).language_model.model.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    trainer.train()
    assert calls == [True] * 5


def test_the_teacher_of_an_adapter_is_the_base_or_the_adapter_before(tmp_path: Path) -> None:
    policy = tiny_policy()
    args = config(tmp_path)
    model = add_adapter(policy.model, "one", args)
    for _, parameter in adapter_parameters(model, "one"):
        nn.init.normal_(parameter, 0, 0.1)
    add_adapter(model, "two", args)

    def anchors(**options: Any) -> Any:
        trainer = InfoVLATrainer(
            model, config(tmp_path, teacher=options.pop("teacher")), policy.dataset.like(policy.task(BOWL)),
            policy.collator, memory=old_tasks(policy), **options,
        )  # fmt: skip
        return trainer.prepare_anchors()

    data = policy.dataset.like(old_tasks(policy).frames)
    for found, adapter in (
        (anchors(teacher="base"), None),
        (anchors(teacher="previous", previous_adapter="one"), "one"),
    ):
        expected = compute_anchors(model, data, policy.collator, adapter=adapter, batch_size=8)
        torch.testing.assert_close(found.action, expected.action, atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match=r"needs the adapter 'zero'.*use teacher='base'"):
        anchors(teacher="previous", previous_adapter="zero")
    with pytest.raises(ValueError, match="Name it by previous_adapter="):
        anchors(teacher="previous")


def test_stored_anchors_are_used_again_while_they_fit(tmp_path: Path) -> None:
    policy = tiny_policy()
    memory = old_tasks(policy).save(tmp_path / "memory")
    args = config(tmp_path)
    model = add_adapter(policy.model, "one", args)

    def trainer(**options: Any) -> InfoVLATrainer:
        stored = ReplayMemory.load(tmp_path / "memory")
        dataset = policy.dataset.like(policy.task(BOWL))
        return InfoVLATrainer(model, config(tmp_path, **options), dataset, policy.collator, memory=stored)

    assert memory.anchors is None
    calls: list[int] = []
    handle = base_model(model).register_forward_hook(lambda *_: calls.append(1))
    first = trainer().prepare_anchors()
    assert len(calls) == 4  # 12 frames of each of two tasks, by 8
    again = trainer().prepare_anchors()
    assert len(calls) == 4
    assert torch.equal(first.action, again.action)  # type: ignore[union-attr]
    trainer(tap_layer=1).prepare_anchors()
    assert len(calls) == 8
    handle.remove()


def test_anchors_are_made_again_where_the_samples_would_be_others(tmp_path: Path) -> None:
    """Another crop or other statistics make other features of the same rows."""
    policy = tiny_policy()
    memory = old_tasks(policy).save(tmp_path / "memory")
    model = add_adapter(policy.model, "one", config(tmp_path))
    calls: list[int] = []
    base_model(model).register_forward_hook(lambda *_: calls.append(1))
    processor, config_of_base = policy.processor, base_model(model).config
    wide = copy.deepcopy(dict(policy.collator.normaliser.as_statistics()))
    wide["libero_goal"]["proprio"]["q99"] = [2.0 + bound for bound in wide["libero_goal"]["proprio"]["q99"]]
    cropped = VLACollator(processor, policy.collator.normaliser, config_of_base, crop=True)
    rescaled = VLACollator(processor, Normaliser(wide, "libero_goal"), config_of_base)
    for collator, expected in ((policy.collator, 4), (cropped, 8), (cropped, 8), (rescaled, 12)):
        stored = ReplayMemory.load(memory.folder)  # type: ignore[arg-type]
        dataset = ChunkDataset(policy.task(BOWL), collator.pipeline, chunk=policy.dataset.chunk)
        InfoVLATrainer(model, config(tmp_path), dataset, collator, memory=stored).prepare_anchors()
        assert len(calls) == expected


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({"push_to_hub": True}, {}, "push what is finished: a run by `infovla push`"),
        ({}, {"compute_loss_func": lambda *_: 0.0}, "compute_loss_func: the policy's loss is the model's own"),
        ({}, {"compute_metrics": lambda _: {}}, "compute_metrics: the policy's loss is the model's own"),
    ],
)
def test_what_would_be_ignored_is_refused(
    tmp_path: Path, options: dict[str, Any], arguments: dict[str, Any], message: str
) -> None:
    policy = tiny_policy()
    with pytest.raises(ValueError, match=message):
        InfoVLATrainer(policy.model, config(tmp_path, **options), policy.dataset, policy.collator, **arguments)


def test_pushing_by_hand_is_refused_like_the_option(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="push what is finished: a run by `infovla push`"):
        adapter_stage(tmp_path).push_to_hub()


def test_arguments_of_another_kind_are_named(tmp_path: Path) -> None:
    policy = tiny_policy()
    args, frames, usual = config(tmp_path), policy.task(BOWL), (policy.dataset, policy.collator)
    cases: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        (
            (policy.model, args, frames, policy.collator),
            {},
            "train_dataset must be a ChunkDataset, got a datasets.Data",
        ),
        ((policy.model, args, None, policy.collator), {}, "train_dataset must be a ChunkDataset, got None"),
        ((policy.model, args, policy.dataset, None), {}, "data_collator must be a VLACollator, got None"),
        ((None, args, *usual), {"model_init": tiny_policy}, "not None; model_init is not supported"),
        ((policy.model, args, *usual), {"eval_dataset": frames}, r"train_dataset.like\(frames\)"),
        ((policy.model, args, *usual), {"eval_dataset": {"one": frames}}, "eval_dataset must hold samples"),
    ]
    for arguments, more, message in cases:
        with pytest.raises(TypeError, match=message):
            InfoVLATrainer(*arguments, **more)
    rows: Any = frames
    with pytest.raises(TypeError, match=r"must hold samples, got the rows of a datasets\.Dataset"):
        InfoVLATrainer(policy.model, args, *usual).evaluate(rows)


@pytest.mark.parametrize("chunk", [1, 8])
def test_chunks_of_another_length_than_the_model_s_are_refused(tmp_path: Path, chunk: int) -> None:
    policy = tiny_policy()
    other = ChunkDataset(policy.task(BOWL), policy.dataset.pipeline, chunk=chunk)
    with pytest.raises(ValueError, match=f"chunks of {chunk} actions, the model makes chunks of 4"):
        InfoVLATrainer(policy.model, config(tmp_path), other, policy.collator)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize(
    ("options", "lost"),
    [
        ({"bias": "all"}, "bias"),
        ({"target_modules": ["q_proj", "fc1"], "bias": "lora_only"}, "fc1.base_layer.bias"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens.lora_embedding_A"),
        ({"modules_to_save": ["projector"]}, "projector.modules_to_save"),
        ({"trainable_token_indices": [1, 2]}, "trainable_tokens_delta"),
        (None, "ia3_l"),
    ],
    ids=str,
)
def test_what_would_be_trained_and_lost_is_refused(tmp_path: Path, options: dict[str, Any] | None, lost: str) -> None:
    policy = tiny_policy()
    base: Any = {"target_modules": ["q_proj"]}
    shape = IA3Config(**base, feedforward_modules=[]) if options is None else LoraConfig(**{**base, **options})
    model: Any = get_peft_model(policy.model, shape)
    with pytest.raises(ValueError, match=rf"\d+ parameters would be lost \(.*{lost}.*one active adapter"):
        InfoVLATrainer(model, config(tmp_path), policy.dataset, policy.collator)


def test_what_is_trained_beside_the_adapter_is_refused(tmp_path: Path) -> None:
    policy = tiny_policy()
    model = add_adapter(policy.model, "one", config(tmp_path))
    base_model(model).projector.fc1.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"would be lost \(.*projector.*activate\(model, 'one', trainable=True\)"):
        InfoVLATrainer(model, config(tmp_path), policy.dataset, policy.collator)
    activate(model, "one", trainable=True)
    InfoVLATrainer(model, config(tmp_path), policy.dataset, policy.collator)
    add_adapter(model, "two", config(tmp_path))
    cast(Any, model.base_model).set_adapter(["one", "two"])
    with pytest.raises(ValueError, match=r"the adapters \['one', 'two'\] are active at once"):
        InfoVLATrainer(model, config(tmp_path), policy.dataset, policy.collator)


def test_a_teacher_is_never_in_training(tmp_path: Path) -> None:
    """Asked when a training goes on, it would be the half-trained student."""
    policy = tiny_policy()
    model = add_adapter(policy.model, "one", config(tmp_path))
    dataset, memory = policy.dataset.like(policy.task(BOWL)), old_tasks(policy)

    def train(model: Any, options: dict[str, Any], **told: Any) -> InfoVLATrainer:
        return InfoVLATrainer(model, config(tmp_path, **options), dataset, policy.collator, memory=memory, **told)

    with pytest.raises(ValueError, match="teacher='previous': the adapter 'one' is in training"):
        train(model, {"teacher": "previous"}, previous_adapter="one")
    with pytest.raises(ValueError, match="teacher='auto': the adapter 'one' is in training"):
        train(model, {"teacher": "auto"}, learned_by={STOVE: "one"})
    whole = tiny_policy().model
    with pytest.raises(ValueError, match="use it with an adapter"):
        train(whole, {})
    assert train(whole, {"method": "er"}).rehearsal.remembered is not None


def test_a_task_that_nobody_knows_is_named(tmp_path: Path) -> None:
    policy = tiny_policy()
    args = config(tmp_path, teacher="auto")
    model = add_adapter(add_adapter(policy.model, "one", args), "two", args)
    with pytest.raises(ValueError, match=r"learned_by names 'turn_on_the_stov', .* known are 'open_the_drawer'"):
        InfoVLATrainer(
            model, args, policy.dataset.like(policy.task(BOWL)), policy.collator, memory=old_tasks(policy),
            learned_by={"turn_on_the_stov": "one"},
        )  # fmt: skip


def test_each_process_needs_samples_of_both_kinds_for_mir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(InfoVLAConfig, "world_size", property(lambda _: 4))
    adapter_stage(tmp_path, method="mir", per_device_train_batch_size=2)
    with pytest.raises(ValueError, match="2 of the 8 samples of a step are replayed, and each of 4 processes"):
        adapter_stage(tmp_path, method="mir", per_device_train_batch_size=2, replay_fraction=0.25)


def test_one_process_uses_one_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainer would wrap the model in `nn.DataParallel`, which cannot gather what it returns."""
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda _: 4))
    args = config(tmp_path)
    assert args.n_gpu == 1
    assert args.train_batch_size == args.per_device_train_batch_size


def three_stages(folder: Path, **options: Any) -> InfoVLATrainer:
    """A third stage: the base learned to open the drawer, adapter "one" to turn on the stove; both differ."""
    policy = tiny_policy(autoregressive=options.pop("autoregressive", False))
    args = config(folder, **{"teacher": "auto", **options})
    model = add_adapter(policy.model, "one", args)
    torch.manual_seed(0)
    for _, parameter in adapter_parameters(model, "one"):
        nn.init.normal_(parameter, 0, 0.1)
    model = add_adapter(model, "two", args, start_from="one")
    return InfoVLATrainer(
        model, args, policy.dataset.like(policy.task(BOWL)), policy.collator, memory=old_tasks(policy),
        previous_adapter="one", learned_by={STOVE: "one"},
    )  # fmt: skip


def test_auto_asks_whoever_learned_a_task(tmp_path: Path) -> None:
    trainer = three_stages(tmp_path, lambda_output=1.0, temperature=0.1)
    anchors, model, data = trainer.prepare_anchors(), trainer.model, trainer.rehearsal.remembered
    assert anchors is not None
    assert data is not None
    for task, adapter, other in ((0, None, "one"), (1, "one", None)):
        rows = data.task == task
        expected = compute_anchors(model, data, trainer._collator, adapter=adapter)  # type: ignore[arg-type]
        wrong = compute_anchors(model, data, trainer._collator, adapter=other)  # type: ignore[arg-type]
        for name in ("action", "output", "fused"):
            found = getattr(anchors, name)[:, rows]
            torch.testing.assert_close(found, getattr(expected, name)[:, rows], atol=1e-5, rtol=1e-4)
            assert (found - getattr(wrong, name)[:, rows]).abs().max() > 1e-3
    policy = tiny_policy()
    model = add_adapter(policy.model, "one", config(tmp_path))
    with pytest.raises(ValueError, match="teacher='auto' needs the adapter 'zero'"):
        InfoVLATrainer(
            model, config(tmp_path, teacher="auto"), policy.dataset.like(policy.task(BOWL)), policy.collator,
            memory=old_tasks(policy), learned_by={STOVE: "zero"},
        )  # fmt: skip
    model = add_adapter(model, "two", config(tmp_path))
    with pytest.raises(ValueError, match=r"which of \['one', 'two'\] learned which past task"):
        InfoVLATrainer(
            model, config(tmp_path, teacher="auto"), policy.dataset.like(policy.task(BOWL)), policy.collator,
            memory=old_tasks(policy),
        )  # fmt: skip


def test_the_same_words_have_one_answer(tmp_path: Path) -> None:
    """Tasks of several scenes share instructions (28 of LIBERO-90's): none is imagined twice, nor beside its own."""
    policy = tiny_policy()
    words = policy.dataset.like(policy.task(BOWL)).instructions[0]
    past = {"SCENE1_a": "open it", "SCENE2_a": "Open it", "SCENE2_b": words.upper(), "c": "close it"}
    model = add_adapter(policy.model, "one", config(tmp_path))
    trainer = InfoVLATrainer(
        model, config(tmp_path, counterfactual_share=0.5, counterfactual_frames=10),
        policy.dataset.like(policy.task(BOWL)), policy.collator, past_tasks=past,
    )  # fmt: skip
    assert trainer.rehearsal.counterfactual is not None
    assert trainer.rehearsal.counterfactual.tasks == ["SCENE1_a", "c"]


def test_the_base_answers_for_its_own_tasks_alone(tmp_path: Path) -> None:
    """Of a task that an adapter has learned it knows no action that were worth keeping."""
    options = {"lambda_output": 1.0, "counterfactual_share": 0.5, "counterfactual_frames": 10, "max_steps": 3}
    found = {teacher: three_stages(tmp_path / teacher, teacher=teacher, **options) for teacher in ("base", "auto")}
    for teacher, trainer in found.items():
        anchors, data = trainer.prepare_anchors(), trainer.rehearsal.remembered
        assert anchors is not None
        assert data is not None
        assert trainer.rehearsal.counterfactual is not None
        foreign = [teacher == "auto" or data.tasks[number] != STOVE for number in data.task]
        rows = torch.tensor([(0, row) for row in range(sum(map(len, trainer.rehearsal.tables)))])
        assert trainer.rehearsal.are_answered(rows).tolist() == foreign + [True] * 10
        assert (STOVE in trainer.rehearsal.counterfactual.tasks) == (teacher == "auto")
        output = anchors.output.clone()
        output[:, [row for row, known in enumerate(foreign) if not known]] = torch.nan
        trainer.rehearsal.use(dataclasses.replace(anchors, output=output))
        for batch in trainer.get_train_dataloader():
            assert torch.isfinite(trainer.compute_loss(trainer.model, batch))  # type: ignore[arg-type]
        assert float(trainer._sums["output"]) > 0
    # A stream of adapters alone: nothing is left that the base could answer.
    trainer = three_stages(tmp_path / "none", teacher="base", **options)
    alone = InfoVLATrainer(
        trainer.model, trainer.args, trainer.train_dataset, trainer._collator, memory=old_tasks(tiny_policy()),
        learned_by=dict.fromkeys(trainer.rehearsal.teachers, "one"),
    )  # fmt: skip
    alone.prepare_anchors()
    assert alone.rehearsal.counterfactual is None
    alone.train()
    assert all(log["output_skipped"] for log in alone.state.log_history if "policy_loss" in log)
    assert all(np.isfinite(losses(alone)))


@pytest.mark.parametrize("autoregressive", [False, True])
@pytest.mark.parametrize("method", ["infovla", "lwf"])
def test_the_label_of_a_counterfactual_frame_is_the_answer_of_its_teacher(
    tmp_path: Path, autoregressive: bool, method: str
) -> None:
    options: dict[str, Any] = {"counterfactual_share": 0.5, "counterfactual_frames": 10, "image_shift": 0}
    trainer = three_stages(
        tmp_path, method=method, lambda_output=1.0, autoregressive=autoregressive, max_steps=3, **options
    )
    trainer.prepare_anchors()
    data, model, memory = trainer.rehearsal.counterfactual, trainer.model, trainer.memory
    assert data is not None
    if method == "infovla":  # what is kept with the memory is about its own frames
        assert memory is not None
        assert memory.anchors is not None
        assert [int(each["rows"]) for each in memory.anchors.spec.values()] == [12, 12]
    assert isinstance(model, nn.Module)
    for row in (0, 9):
        adapter = "one" if (data.tasks[data.task[row]] == STOVE and method == "infovla") or method == "lwf" else None
        with teacher_mode(model, adapter):
            observations = trainer._collator.observations(data.__getitems__([row]))
            expected = base_model(model).predict_action(**observations, unnorm_key="libero_goal")
        found = data.__getitems__([row]).actions[0, : np.atleast_2d(expected).shape[0]]
        torch.testing.assert_close(
            torch.tensor(found).flatten().double(), torch.tensor(expected).flatten().double(), atol=1e-4, rtol=1e-4
        )
    trainer.train()
    assert all(np.isfinite(losses(trainer)))


@pytest.mark.parametrize("pooling", [None, "prompt", "vision"])
def test_student_and_teacher_pool_the_same_positions(tmp_path: Path, pooling: str | None) -> None:
    """A fresh adapter is the teacher, so that RAC, which asks for the teacher's similarities, pulls at nothing."""
    options = {"lambda_cmi": 0.0, "lambda_output": 0.0, "rac_targets": "soft", "rac_pooling": pooling}
    trainer = adapter_stage(tmp_path, **options)
    trainer.prepare_anchors()
    trainer.compute_loss(trainer.model, first_batch(trainer))
    assert 0 <= trainer._sums["rac"] / trainer._counts["rac"] < 1e-5


def test_at_the_start_of_a_stage_rounding_stays_rounding(tmp_path: Path) -> None:
    """There the student is the teacher: answers that differ in the last bits must not turn the gradient around."""
    options = {"counterfactual_share": 1.0, "counterfactual_frames": 16, "replay_fraction": 0.75}
    trainer = adapter_stage(tmp_path, lambda_rac=0.0, lambda_cmi=0.0, lambda_output=1.0, **options)
    answers = cast(Anchors, trainer.prepare_anchors()).output
    batch = first_batch(trainer)
    exact = batch["actions"].clone()
    gradients = []
    for seed in (0, 1):
        generator = torch.Generator().manual_seed(seed)
        answers += 1e-7 * torch.randn(answers.shape, generator=generator)
        batch["actions"] = exact + 1e-7 * torch.randn(exact.shape, generator=generator)
        trainer.model.zero_grad()
        trainer.compute_loss(trainer.model, batch).backward()
        parameters = adapter_parameters(trainer.model, "one")
        gradients.append(torch.cat([p.grad.flatten() for _, p in parameters if p.grad is not None]))
    first, second = gradients
    assert (first - second).norm() < 2e-3 * first.norm()


def test_the_output_term_holds_autoregressive_answers_too(tmp_path: Path) -> None:
    policy = tiny_policy(autoregressive=True)
    trainer = adapter_stage(tmp_path, policy, lambda_output=1.0, lambda_rac=0.0, lambda_cmi=0.0)
    anchors = trainer.prepare_anchors()
    assert anchors is not None
    assert anchors.output.shape == (1, 24, 7, 256)
    trainer.train()
    assert losses(trainer, "output")[0] == pytest.approx(0.0, abs=1e-5)  # the adapter begins as the base
    assert losses(trainer, "output")[-1] > 1e-4


# --- the loss, over processes, accumulation and precision ---


def test_the_loss_halves_on_one_repeated_batch(tmp_path: Path) -> None:
    policy = tiny_policy(frames=2)
    args = config(tmp_path, method="er", max_steps=30, image_shift=0, learning_rate=5e-3, lora_r=16, lora_alpha=16)
    model = add_adapter(policy.model, "one", args)
    dataset = policy.dataset.like(policy.task(BOWL))
    trainer = InfoVLATrainer(model, args, dataset, policy.collator)
    trainer.train()
    assert losses(trainer)[-1] < 0.5 * losses(trainer)[0]


def test_plain_openvla_learns_too(tmp_path: Path) -> None:
    """Autoregressive decoding: cross-entropy on action tokens, features at the positions that predict them."""
    policy = tiny_policy(autoregressive=True)
    trainer = adapter_stage(tmp_path, policy, max_steps=12, learning_rate=5e-3, lora_r=16, lora_alpha=16)
    trainer.train()
    assert sum(losses(trainer, "policy_loss")[-3:]) < sum(losses(trainer, "policy_loss")[:3])
    assert all(value > 0 for value in losses(trainer, "rac") + losses(trainer, "cmi")[1:])


def test_the_terms_fall_when_they_are_trained(tmp_path: Path) -> None:
    trainer = adapter_stage(tmp_path, max_steps=40, lambda_rac=1.0, lambda_cmi=1.0, cmi_mode="infonce", image_shift=0)
    for _, parameter in adapter_parameters(trainer.model, "one"):
        nn.init.normal_(parameter, 0, 0.2)
    trainer.train()
    for name in ("rac", "cmi"):
        curve = losses(trainer, name)
        assert sum(curve[-5:]) < 0.8 * sum(curve[:5]), name


def gradient(folder: Path, **options: Any) -> dict[str, Tensor]:
    """The change of the adapter in one step of SGD with a learning rate of 1."""
    options = {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0, **options}
    trainer = adapter_stage(folder, lr_scheduler_type="constant", **options)
    torch.manual_seed(0)
    before = {}
    for name, parameter in adapter_parameters(trainer.model, "one"):
        nn.init.normal_(parameter, 0, 0.1)
        before[name] = parameter.detach().clone()
    trainer.train()
    return {name: p.detach() - before[name] for name, p in adapter_parameters(trainer.model, "one")}


def close(first: dict[str, Tensor], second: dict[str, Tensor], **tolerance: float) -> None:
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def test_accumulated_batches_count_as_their_mean(tmp_path: Path) -> None:
    """Two batches accumulated = the mean of two gradients, each taken at the same parameters."""

    def of_batch(number: int) -> dict[str, Tensor]:
        trainer = adapter_stage(tmp_path, max_steps=2)
        torch.manual_seed(0)
        for _, parameter in adapter_parameters(trainer.model, "one"):
            nn.init.normal_(parameter, 0, 0.1)
        trainer.prepare_anchors()
        batch = list(trainer.get_train_dataloader())[number]
        trainer.compute_loss(trainer.model, batch).backward()  # type: ignore[arg-type]
        return {name: p.grad for name, p in adapter_parameters(trainer.model, "one") if p.grad is not None}

    accumulated = gradient(tmp_path, gradient_accumulation_steps=2)
    one, two = of_batch(0), of_batch(1)
    close({name: -(one[name] + two[name]) / 2 for name in one}, accumulated, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("tap_layer", [-1, 1])
def test_gradient_checkpointing_changes_nothing(tmp_path: Path, tap_layer: int) -> None:
    plain = gradient(tmp_path, tap_layer=tap_layer)
    close(plain, gradient(tmp_path, tap_layer=tap_layer, activation_checkpointing=True), atol=1e-6, rtol=1e-4)


def test_the_norm_of_the_gradient_is_limited(tmp_path: Path) -> None:
    change = gradient(tmp_path, max_grad_norm=0.01)
    norm = torch.cat([tensor.flatten() for tensor in change.values()]).norm()
    assert norm == pytest.approx(0.01, rel=1e-3)


def test_bfloat16_autocast(tmp_path: Path) -> None:
    def trained(bf16: bool) -> InfoVLATrainer:
        trainer = adapter_stage(tmp_path / str(bf16), bf16=bf16, max_steps=2, learning_rate=1e-3)
        trainer.train()
        return trainer

    half, single = trained(True), trained(False)
    assert all(parameter.dtype == torch.float32 for parameter in half.model.parameters())  # type: ignore[union-attr]
    for name in ("policy_loss", "rac"):
        assert losses(half, name) == pytest.approx(losses(single, name), rel=0.05)
        assert losses(half, name) != losses(single, name)
    anchors = half.memory.anchors  # type: ignore[union-attr]
    assert anchors is not None
    assert ({spec["dtype"] for spec in anchors.spec.values()}, anchors.action.dtype) == ({"bf16"}, torch.float32)


# --- resuming ---


@pytest.mark.parametrize("method", ["infovla", "infovla_paper", "er", "mir", "der++", "lwf", "ewc"])
def test_a_resumed_run_reproduces_the_uninterrupted_one(tmp_path: Path, method: str) -> None:
    options: dict[str, Any] = {
        "method": method, "max_steps": 6, "save_strategy": "steps", "save_steps": 3, "lora_dropout": 0.3,
        "proprio_noise": 0.05, "gradient_accumulation_steps": 2, "anchor_views": 2,
        "counterfactual_share": 0.5 if method == "lwf" else 0.0,
    }  # fmt: skip

    def trainer(folder: str) -> InfoVLATrainer:
        made = adapter_stage(tmp_path / folder, **options)
        made._consolidation = _consolidation(made.model) if method == "ewc" else None
        return made

    whole = trainer("whole")
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    names = {file.name for file in checkpoint.iterdir()}
    assert {"adapter_model.safetensors", "optimizer.pt", "trainer_state.json"} <= names
    assert ("term_networks.safetensors" in names) == (method == "infovla_paper")

    resumed = trainer("resumed")
    torch.manual_seed(12345)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for name, parameter in adapter_parameters(whole.model, "one"):
        assert torch.equal(dict(adapter_parameters(resumed.model, "one"))[name], parameter), name
    assert whole._networks().keys() == resumed._networks().keys()
    assert all(torch.equal(tensor, whole._networks()[name]) for name, tensor in resumed._networks().items())
    assert resumed.state.log_history[3:6] == whole.state.log_history[3:6]


def test_the_base_stage_resumes_too(tmp_path: Path) -> None:
    def trainer(folder: Path) -> InfoVLATrainer:
        policy = tiny_policy()
        options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
        return InfoVLATrainer(policy.model, config(folder, **options), policy.dataset, policy.collator)

    whole, resumed = trainer(tmp_path / "whole"), trainer(tmp_path / "resumed")
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    expected = whole.model.state_dict()  # type: ignore[union-attr]
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.model.state_dict().items())  # type: ignore[union-attr]


def test_the_same_command_goes_on_where_it_was(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1}
    adapter_stage(tmp_path, max_steps=4, **options).train(resume_from_checkpoint=True)  # nothing there yet
    (tmp_path / "checkpoint-4" / "trainer_state.json").write_text("{")  # killed while writing
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")
    trainer = adapter_stage(tmp_path, max_steps=4, **options)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert {"stage", "step", "loss", "policy_loss", "rac", "cmi", "lr"} <= set(lines[0])
    assert last_checkpoint(tmp_path / "none") is None


def test_a_checkpoint_that_is_named_is_checked_too(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    trainer = adapter_stage(tmp_path / "run", **options)
    trainer.train()
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*-7; there are in .*: checkpoint-1, checkpoint-2"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-7"))
    moved = (tmp_path / "run" / "checkpoint-1").rename(tmp_path / "kept")
    adapter_stage(tmp_path / "again", **options).train(resume_from_checkpoint=str(moved))
    with (moved / "adapter_model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    with pytest.raises(ValueError, match=r"adapter_model.safetensors is damaged; go on from another checkpoint"):
        adapter_stage(tmp_path / "again", **options).train(resume_from_checkpoint=str(moved))


# --- the log, and refusals ---


def test_evaluations_are_in_the_log(tmp_path: Path) -> None:
    policy = tiny_policy()
    folder = tmp_path / "stages" / "stage_00"
    args = config(folder, report_to=["jsonl"], max_steps=2, eval_strategy="steps", eval_steps=1)
    InfoVLATrainer(policy.model, args, policy.dataset, policy.collator, eval_dataset=policy.dataset).train()
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [(line["step"], "loss" in line, "eval_loss" in line) for line in lines] == [
        (1, True, False), (1, False, True), (2, True, False), (2, False, True)
    ]  # fmt: skip
    curves, unreadable = read_loss_curves(tmp_path)
    assert ([curve.term for curve in curves], unreadable) == (["policy_loss"], 0)
    assert list(curves[0].steps) == [1, 2]


def test_the_folder_of_a_training_is_entered_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[Path] = []
    monkeypatch.setattr(files, "fsync", lambda path: entered.append(Path(path)))
    adapter_stage(tmp_path / "stages" / "stage_01")
    assert entered == [tmp_path / "stages", tmp_path]


def test_a_damaged_log_is_continued(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    deep, huge = b"[" * 100_000, b'{"step": ' + b"9" * 400 + b"}"
    whole = [b'{"stage": 1, "step": 1, "loss": 0.5}', b'{"stage": 1, "step": 2, "loss": 0.25}']
    log.write_bytes(
        b"\n".join([whole[0], b'{"step": 1, "loss": \xff\xfe', deep, huge, b"[]", b"3", whole[1], b'{"st'])
    )
    LossLog(log, 1).on_train_begin(
        TrainingArguments(str(tmp_path), use_cpu=True), TrainerState(global_step=2), TrainerControl()
    )
    assert log.read_bytes().splitlines() == whole


def test_terms_without_information_are_skipped_and_counted(tmp_path: Path) -> None:
    """One trajectory shorter than the near-duplicate window: no frame has a negative."""
    policy = tiny_policy(frames=6)
    args = config(tmp_path, cmi_mode="infonce", gradient_accumulation_steps=2, max_steps=3)
    model = add_adapter(policy.model, "one", args)
    memory = ReplayMemory().add(policy.task(DRAWER))
    trainer = InfoVLATrainer(model, args, policy.dataset.like(policy.task(BOWL)), policy.collator, memory=memory)
    trainer.train()
    for entry in trainer.state.log_history[:3]:
        assert (entry["rac_skipped"], entry["cmi_skipped"]) == (2, 2)
        assert "rac" not in entry
        assert entry["loss"] == pytest.approx(entry["policy_loss"], rel=1e-6)


def test_the_loss_is_the_weighted_sum_of_what_is_logged(tmp_path: Path) -> None:
    trainer = adapter_stage(tmp_path, lambda_rac=0.3, lambda_cmi=0.7, logging_steps=2)
    trainer.train()
    for entry in trainer.state.log_history[:2]:
        total = entry["policy_loss"] + 0.3 * entry["rac"] + 0.7 * entry["cmi"]
        assert entry["loss"] == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "terms", "replay"),
    [
        ({"method": "sequential"}, [], False),
        ({"method": "er"}, [], True),
        ({"method": "infovla"}, ["rac", "cmi"], True),
        ({"method": "infovla", "lambda_cmi": 0.0}, ["rac"], True),
        ({"method": "infovla", "lambda_output": 1.0}, ["rac", "cmi", "output"], True),
        ({"method": "infovla", "replay_fraction": 0.0, "counterfactual_share": 0.5}, [], False),
        ({"method": "der++", "lambda_output": 1.0}, ["output"], True),
        ({"method": "lwf", "counterfactual_share": 0.5}, [], True),
    ],
)
def test_what_a_method_adds(tmp_path: Path, options: dict[str, Any], terms: list[str], replay: bool) -> None:
    trainer = adapter_stage(tmp_path, **options)
    assert [term.name for term in trainer.terms] == terms
    assert ("replay" in first_batch(trainer)) == replay
    assert (trainer.prepare_anchors() is not None) == bool(terms)


def test_epochs_are_turned_into_steps(tmp_path: Path) -> None:
    trainer = adapter_stage(tmp_path, max_steps=-1, num_train_epochs=2)
    assert trainer.args.max_steps == 12  # 24 frames, twice, by 4 current samples per batch
    policy = tiny_policy()
    base = InfoVLATrainer(
        policy.model, config(tmp_path, max_steps=-1, num_train_epochs=2), policy.dataset, policy.collator
    )
    assert base.args.max_steps == 18  # 72 frames, twice, by 8


def test_a_batch_too_small_for_replay(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="larger batches or a smaller replay_fraction"):
        adapter_stage(tmp_path, per_device_train_batch_size=2)


def test_the_network_of_the_paper_belongs_to_an_adapter(tmp_path: Path) -> None:
    policy = tiny_policy()
    with pytest.raises(ValueError, match="use it with an adapter"):
        InfoVLATrainer(
            policy.model, config(tmp_path, method="infovla_paper"), policy.dataset.like(policy.task(BOWL)),
            policy.collator, memory=old_tasks(policy),
        )  # fmt: skip


def test_the_network_of_the_paper_does_not_decay(tmp_path: Path) -> None:
    trainer = adapter_stage(tmp_path, method="infovla_paper", weight_decay=0.1)
    names = trainer.get_decay_parameter_names(trainer.model)
    assert any(".lora_A." in name for name in names)
    assert not [name for name in names if "network" in name]


def test_batches_made_in_worker_processes_are_the_same(tmp_path: Path) -> None:
    plain, workers = (
        adapter_stage(tmp_path, dataloader_num_workers=number, proprio_noise=0.1).get_train_dataloader()
        for number in (0, 2)
    )
    for one, other in zip(plain, workers, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(value, other[name]) for name, value in one.items() if name != "replay")
        assert (one["replay"].own == other["replay"].own).all()


def test_an_adapter_that_is_not_trainable_says_so(tmp_path: Path) -> None:
    policy = tiny_policy()
    model = add_adapter(policy.model, "one", config(tmp_path))
    activate(model, "one")
    with pytest.raises(ValueError, match="nothing is trainable"):
        InfoVLATrainer(model, config(tmp_path), policy.dataset, policy.collator)


def test_nothing_holds_a_model_after_its_stage(tmp_path: Path) -> None:
    trainer = adapter_stage(tmp_path, max_steps=1)
    gc.collect()
    gc.disable()  # reference counts alone must do: a collection may come when the next model is there already
    try:
        trainer.train()
        kept = [weakref.ref(trainer), weakref.ref(trainer.model), weakref.ref(base_model(cast(Any, trainer.model)))]
        del trainer
        assert [reference() for reference in kept] == [None] * 3
    finally:
        gc.enable()


def test_terms_of_weight_0_are_as_if_they_were_not_there(tmp_path: Path) -> None:
    """What is left of a method without its terms is plain replay: the same weights, bit for bit."""
    weights: dict[str, dict[str, Tensor]] = {}
    for method in ("er", "infovla", "der++"):
        none = {"lambda_rac": 0.0, "lambda_cmi": 0.0, "lambda_output": 0.0, "lora_dropout": 0.1}
        trainer = adapter_stage(tmp_path / method, max_steps=2, method=method, **none)
        trainer.train()
        assert not trainer.terms
        weights[method] = snapshot(cast(nn.Module, trainer.model))
    for method in ("infovla", "der++"):
        assert weights[method].keys() == weights["er"].keys()
        assert all(torch.equal(tensor, weights["er"][name]) for name, tensor in weights[method].items()), method


def test_with_nothing_stored_replay_is_plain_fine_tuning(tmp_path: Path) -> None:
    """Bit for bit, so that `without_memory` may say so."""
    past = {DRAWER: "open the drawer", STOVE: "turn on the stove"}
    weights: dict[str, dict[str, Tensor]] = {}
    for method in METHODS:
        if without_memory(method) == "sequential":
            policy = tiny_policy()
            args = config(tmp_path / method, method=method, max_steps=2, lora_dropout=0.1)
            model = add_adapter(policy.model, "one", args)
            dataset = policy.dataset.like(policy.task(BOWL))
            trainer = InfoVLATrainer(model, args, dataset, policy.collator, memory=ReplayMemory(), past_tasks=past)
            trainer.train()
            weights[method] = snapshot(cast(nn.Module, trainer.model))
    assert weights.keys() == {"sequential", "er", "infovla_paper", "der++", "mir"}
    for method, found in weights.items():
        assert found.keys() == weights["sequential"].keys()
        assert all(torch.equal(tensor, weights["sequential"][name]) for name, tensor in found.items()), method


def test_a_penalty_of_weight_0_is_as_if_it_were_not_there(tmp_path: Path) -> None:
    weights: dict[float | None, dict[str, Tensor]] = {}
    for weight in (None, 0.0, 1e3):
        options = {"method": "sequential"} if weight is None else {"method": "ewc", "lambda_ewc": weight}
        trainer = adapter_stage(tmp_path / str(weight), max_steps=2, lora_dropout=0.1, **options)
        model = cast(Any, trainer.model)
        if weight is not None:
            reference = {
                key.replace(".one.", "."): parameter.detach().clone()
                for key, parameter in adapter_parameters(model, "one")
            }
            trainer._consolidation = Consolidation(
                {key: torch.ones_like(v) for key, v in reference.items()}, reference
            )
        trainer.train()
        weights[weight] = snapshot(model)
    same = {
        weight: all(torch.equal(tensor, weights[None][name]) for name, tensor in found.items())
        for weight, found in weights.items()
    }
    assert same == {None: True, 0.0: True, 1e3: False}


def test_features_are_held_on_memory_samples_alone_and_answers_on_all(tmp_path: Path) -> None:
    seen: dict[str, list[Tensor]] = {}

    class Watched:
        def __init__(self, term: Any) -> None:
            self.term = term

        def __getattr__(self, name: str) -> Any:
            return getattr(self.term, name)

        def __call__(self, student: Any, contrast: Any) -> Any:
            seen.setdefault(self.term.name, []).append(contrast.own)
            return self.term(student, contrast)

    trainer = adapter_stage(tmp_path, counterfactual_share=0.5, lambda_output=1.0, max_steps=2)
    trainer.rehearsal.terms = [Watched(term) for term in trainer.terms]
    trainer.train()
    kept = len(old_tasks(tiny_policy()))
    for name in ("rac", "cmi"):
        assert [len(rows) for rows in seen[name]] == [2, 2]  # of four replay samples
        assert all((rows[:, 1] < kept).all() for rows in seen[name])
    assert [len(rows) for rows in seen["output"]] == [4, 4]
    assert all((rows[2:, 1] >= kept).all() for rows in seen["output"])
    negatives = trainer.rehearsal.negatives
    assert negatives is not None
    assert (negatives._chosen[:, 1] < kept).all()
    alone = adapter_stage(tmp_path / "alone", counterfactual_share=1.0, lambda_output=1.0, max_steps=1)
    alone.train()
    assert losses(alone, "rac_skipped") == losses(alone, "cmi_skipped") == [1]  # no memory sample in the batch
    assert losses(alone, "output")


def test_the_penalty_of_ewc_is_added(tmp_path: Path) -> None:
    trainer = adapter_stage(tmp_path, method="ewc", lambda_ewc=2.0)
    model: Any = trainer.model
    start = {name.replace(".one.", "."): value.detach().clone() for name, value in adapter_parameters(model, "one")}
    trainer._consolidation = Consolidation({name: torch.ones_like(value) for name, value in start.items()}, start)
    with torch.no_grad():
        for _, parameter in adapter_parameters(model, "one"):
            parameter.add_(0.1)
    batch = next(iter(trainer.get_train_dataloader()))
    added = (trainer.compute_loss(model, batch) - model(**batch).loss).detach()
    numbers = sum(value.numel() for value in start.values())
    assert float(added) == pytest.approx(2.0 * 0.5 * 0.1**2 * numbers, rel=1e-4)


def test_mir_replays_what_it_has_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = adapter_stage(tmp_path, method="mir", mir_candidates=3)
    batch = next(iter(trainer.get_train_dataloader()))
    offered, chosen = len(batch.pop("replay").own), (1, 4, 6, 11)  # three for each of four places
    asked: list[tuple[Any, ...]] = []

    def choose(*arguments: Any) -> Tensor:
        asked.append(arguments)
        return torch.tensor(chosen)

    monkeypatch.setattr("infovla_peft.trainer.most_interfered", choose)
    trainer.create_optimizer()
    kept = trainer._retrieve(batch, offered)
    *_, count, rate, optimizer = asked[0]
    assert (count, rate) == (len(chosen), trainer.args.learning_rate)
    assert optimizer is trainer.optimizer is not None
    for name, rows in kept.items():
        first = len(batch[name]) - offered
        assert torch.equal(rows, batch[name][[*range(first), *(first + row for row in chosen)]])


def test_views_of_counterfactual_frames_are_augmented(tmp_path: Path) -> None:
    trainer = three_stages(tmp_path, counterfactual_share=0.5, counterfactual_frames=10, image_shift=2)
    views, remembered = trainer.rehearsal.views, trainer.rehearsal.remembered
    assert views is not None
    assert remembered is not None
    assert not views.shifts[0, : len(remembered)].any()
    assert views.shifts[0, len(remembered) :].any()


@pytest.mark.parametrize("split", [([0, 2, 3], [1]), ([0], [1, 2, 3])])
def test_the_terms_of_two_processes_average_to_those_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: tuple[list[int], list[int]]
) -> None:
    options = {"lambda_output": 1.0, "counterfactual_share": 0.5, "counterfactual_frames": 10}
    trainer = three_stages(tmp_path, teacher="base", **options)
    trainer.prepare_anchors()
    model: Any = trainer.model
    batch = next(iter(trainer.get_train_dataloader()))
    rows = batch.pop("replay").own
    first = len(batch["input_ids"]) - len(rows)
    assert trainer.rehearsal.are_answered(torch.from_numpy(rows)).tolist().count(False) == 1

    def terms(mine: list[int], theirs: list[int]) -> Tensor:
        part = {name: tensor[[first + row for row in mine]] for name, tensor in batch.items()}
        loss = trainer.compute_loss(model, {**part, "replay": ReplayRows(rows[mine], rows[theirs])})
        policy_loss: Tensor = trainer._policy_loss(model(**part, return_logits=False), part)
        return (loss - policy_loss).detach()  # type: ignore[no-any-return]

    whole = terms([0, 1, 2, 3], [])
    monkeypatch.setattr(InfoVLAConfig, "world_size", property(lambda _: 2))
    one, two = split
    torch.testing.assert_close((terms(one, two) + terms(two, one)) / 2, whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("batch", "fraction"), [(5, 0.5), (8, 0.01), (6, 0.25)])
def test_an_epoch_is_all_samples_of_the_current_task_once(tmp_path: Path, batch: int, fraction: float) -> None:
    trainer = adapter_stage(
        tmp_path, max_steps=-1, num_train_epochs=2, per_device_train_batch_size=batch, replay_fraction=fraction
    )
    seen = sum(len(trainer._sampler().draw(step).current) for step in range(trainer.args.max_steps))
    per_step = seen / trainer.args.max_steps
    assert 0 <= seen - 2 * len(trainer.train_dataset) < per_step  # type: ignore[arg-type]


def _consolidation(model: Any, size: int | None = None) -> Consolidation:
    start = {name.replace(".one.", "."): value.detach().clone() for name, value in adapter_parameters(model, "one")}
    if size is not None:
        start = {name: value.new_zeros(size) for name, value in start.items()}
    return Consolidation({name: torch.ones_like(value) for name, value in start.items()}, start)


def test_ewc_has_a_consolidation_of_its_adapter_and_no_other_method_has(tmp_path: Path) -> None:
    policy = tiny_policy()
    args = config(tmp_path, method="ewc", max_steps=1)
    model = add_adapter(policy.model, "one", args)
    data, past = policy.dataset.like(policy.task(BOWL)), {"a task": "do a task"}

    def trainer(method: str = "ewc", **options: Any) -> InfoVLATrainer:
        return InfoVLATrainer(model, config(tmp_path, method=method, max_steps=1), data, policy.collator, **options)

    trainer(past_tasks={})  # nothing is past: the first stage of B0
    trainer(past_tasks=past, consolidation=_consolidation(model))
    with pytest.raises(ValueError, match="without consolidation is plain fine-tuning"):
        trainer(past_tasks=past)
    with pytest.raises(ValueError, match="the penalty of method='ewc', not of 'er'"):
        trainer("er", consolidation=_consolidation(model))
    with pytest.raises(ValueError, match="is of another adapter than 'one': the fisher of"):
        trainer(consolidation=_consolidation(model, size=3))
    with pytest.raises(ValueError, match="missing"):
        trainer(consolidation=Consolidation({}, {}))
    with pytest.raises(ValueError, match="train an adapter"):
        InfoVLATrainer(tiny_policy().model, args, data, policy.collator, consolidation=_consolidation(model))


@pytest.mark.parametrize(
    ("name", "value", "cure"),
    [
        ("memory", "runs/x/memory", r"ReplayMemory.load\(folder\)"),
        ("past_tasks", ["open_the_drawer"], "a mapping, name of a task → instruction"),
        ("learned_by", ["open_the_drawer"], "a mapping, name of a task → adapter"),
        ("consolidation", "fisher.safetensors", "Consolidation.load"),
    ],
)
def test_what_is_no_description_of_past_tasks_is_named(tmp_path: Path, name: str, value: Any, cure: str) -> None:
    policy = tiny_policy()
    args = config(tmp_path, max_steps=1)
    model = add_adapter(policy.model, "one", args)
    with pytest.raises(TypeError, match=cure):
        InfoVLATrainer(
            model, args, policy.dataset.like(policy.task(BOWL)), policy.collator, **cast(Any, {name: value})
        )


def test_terms_on_features_that_nothing_trains_are_refused(tmp_path: Path) -> None:
    trainer = adapter_stage(tmp_path, lora_targets="action_head.model.fc1", tap_layer=1, max_steps=1)
    with pytest.raises(ValueError, match="no layer before tap_layer 1 is trained; raise tap_layer"):
        trainer.train()
    adapter_stage(
        tmp_path / "output", lora_targets="action_head.model.fc1", tap_layer=1, max_steps=1,
        lambda_rac=0.0, lambda_cmi=0.0, lambda_output=0.3,
    ).train()  # fmt: skip

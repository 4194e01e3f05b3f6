"""Stream notation, configuration checks, and recipes: YAML first, command line over it."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from infovla_peft.config import InfoVLAConfig, StreamConfig, load_recipe, parse_stream, resolved_config


def test_stream_notation() -> None:
    assert parse_stream("B5-5N1") == (5, 5, 1)
    assert parse_stream(" b0-2n3 ").total_tasks == 6


@pytest.mark.parametrize("notation", ["", "B3", "3-2N1", "B3-0N1", "B3-2N0", "B3-2N", "B-1-2N1", "B3_2N1"])
def test_unknown_stream_notation_says_how_to_write_it(notation: str) -> None:
    with pytest.raises(ValueError, match="write Bi-kNm"):
        parse_stream(notation)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lambda_rac": -0.1}, "lambda_rac must be at least 0"),
        ({"temperature": 0.0}, "temperature must be at least 1e-06"),
        ({"temperature": 1e-39}, "temperature must be at least 1e-06"),
        ({"num_train_epochs": 0}, "num_train_epochs must be above 0, or max_steps be set"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be at least 1"),
        ({"save_strategy": "epoch"}, "save_strategy must not be epoch: .* set save_strategy to steps, and save_steps"),
        ({"eval_strategy": "epoch"}, "set eval_strategy to steps, and eval_steps"),
        ({"logging_strategy": "epoch"}, "set logging_strategy to steps, and logging_steps"),
        ({"merge_weight": math.nan}, "merge_weight must be a finite number"),
        ({"replay_fraction": 1.0}, r"replay_fraction must be in \[0, 1\)"),
        ({"method": "magic"}, "method must be one of sequential, er"),
        ({"teacher": "oracle"}, "teacher must be one of base, auto, previous"),
        ({"tap_layer": 0}, "tap_layer 0 is the embeddings"),
        ({"lora_r": 0}, "lora_r must be at least 1"),
        ({"lora_r": "8"}, "lora_r must be of type int, got '8'"),
        ({"rac_center": 1}, "rac_center must be of type bool, got 1"),
        ({"remove_unused_columns": True}, "must stay False"),
        (
            {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"},
            "rollouts say, not a loss",
        ),
        ({"save_only_model": True}, "save_only_model must stay False: a training that goes on without its optimiser"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor must stay 0.0"),
        ({"dataloader_drop_last": True}, "dataloader_drop_last must stay False"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size must stay False"),
        ({"method": "lwf", "counterfactual_share": 0.0}, "lwf is its counterfactual frames"),
        ({"merge_rank": -1}, "merge_rank must be"),
        ({"train_sampling_strategy": "sequential"}, "train_sampling_strategy must stay random"),
        ({"ignore_data_skip": True}, "ignore_data_skip must stay False: .* would see other batches"),
        ({"torch_compile_mode": "default"}, "torch_compile_mode is not supported: .* set torch_compile alone"),
        ({"torch_compile_backend": "eager"}, "torch_compile_backend is not supported"),
    ],
)
def test_training_options_are_checked(tmp_path: Path, change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InfoVLAConfig(output_dir=str(tmp_path), **change)  # type: ignore[arg-type]


def test_another_method_does_not_keep_what_one_has_set(tmp_path: Path) -> None:
    plain = InfoVLAConfig(output_dir=str(tmp_path), max_steps=3)
    paper = dataclasses.replace(InfoVLAConfig(output_dir=str(tmp_path), method="infovla_paper"), max_steps=3)
    assert (paper.max_steps, paper.lambda_rac, paper.teacher) == (3, 0.1, "previous")
    assert dataclasses.replace(plain, method="er").method == "er"
    for config, method in (
        (plain, "infovla_paper"),
        (paper, "infovla"),
        (dataclasses.replace(plain, method="ewc"), "er"),
    ):
        with pytest.raises(ValueError, match=rf"would keep .* make a new InfoVLAConfig\(method='{method}', ...\)"):
            dataclasses.replace(config, method=method)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"suite": "libero_gaol"}, "suite must be one of libero_spatial"),
        ({"stream": "B3"}, "write Bi-kNm"),
        ({"stream": "B0-2N1"}, "has no base tasks"),
        ({"tasks": ["0", "1"]}, "needs 5 tasks, but `tasks` names 2"),
        ({"tasks": ["0", "1", "2", "3", "3"]}, "names a task twice"),
        ({"tiny_patch_size": 13}, "no multiple of tiny_patch_size"),
        ({"eval_episodes": 0}, "eval_episodes must be at least 1"),
        ({"final_eval_episodes": 0}, "final_eval_episodes must be at least 1"),
        ({"rollout_max_steps": 0}, "rollout_max_steps must be at least 1"),
        ({"eval_episodes": 60}, "50 initial states per task, but eval_episodes 60 from eval_first_state 0"),
        ({"eval_first_state": 45}, "eval_episodes 20 from eval_first_state 45 on would need 65"),
        ({"final_eval_episodes": 51}, "final_eval_episodes 51"),
        ({"cameras": "agentview"}, "cameras must be of type list, got 'agentview'"),
        ({"demonstration_noise": True}, "demonstration_noise must be of type float, got True"),
    ],
)
def test_stream_options_are_checked(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StreamConfig(**change)  # type: ignore[arg-type]


def recipe(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_command_line_overrides_the_recipe(tmp_path: Path) -> None:
    path = recipe(
        tmp_path,
        f"output_dir: {tmp_path / 'run'}\nstream: B2-1N1\ntasks: [turn_on_the_stove, '4', 7]\nlearning_rate: 1e-3\n"
        "anchor_bank: 64\nlambda_rac: 0.5\ntap_layer: -2\ndemonstrations_folder: null\n"
        "lr_scheduler_kwargs: {min_lr: 0.0}\n",
    )
    stream, training = load_recipe(path, ["--lambda_rac", "0.25", "--lora-r=8", "--activation_checkpointing"])
    assert stream.shape == (2, 1, 1)
    assert stream.tasks == ["turn_on_the_stove", "4", "7"]
    assert stream.demonstrations_folder is None
    assert (training.learning_rate, training.anchor_bank, training.tap_layer) == (1e-3, 64, -2)
    assert (training.lambda_rac, training.lora_r, training.activation_checkpointing) == (0.25, 8, True)
    assert training.lr_scheduler_kwargs == {"min_lr": 0.0}


def test_several_trackers_are_a_list(tmp_path: Path) -> None:
    names = ["jsonl", "tensorboard"]
    assert load_recipe(recipe(tmp_path, "report_to: [jsonl, tensorboard]\n"), [])[1].report_to == names
    assert load_recipe(None, ["--report_to", *names])[1].report_to == names
    assert load_recipe(recipe(tmp_path, "report_to: jsonl\n"), [])[1].report_to == ["jsonl"]
    assert load_recipe(recipe(tmp_path, "report_to: none\n"), [])[1].report_to == []
    for trackers in (None, "none"):
        assert InfoVLAConfig(output_dir=str(tmp_path), report_to=trackers).report_to == []  # type: ignore[arg-type]


def test_targets_may_be_a_list_as_in_peft(tmp_path: Path) -> None:
    targets: Any = ["q_proj", "v_proj"]
    assert InfoVLAConfig(output_dir=str(tmp_path), lora_targets=targets).lora_targets == "q_proj,v_proj"


def test_what_python_has_for_a_value_is_taken(tmp_path: Path) -> None:
    places: Any = {"base_model": tmp_path, "demonstrations_folder": tmp_path / "demos", "cameras": ("agentview",)}
    config = StreamConfig(**places, stream="B1-1N1")
    assert (config.base_model, config.demonstrations_folder) == (str(tmp_path), str(tmp_path / "demos"))
    assert config.cameras == ["agentview"]
    numbers: Any = {"lora_alpha": 16.0, "lora_r": np.int64(8), "temperature": 1, "report_to": ("jsonl",)}
    training = InfoVLAConfig(output_dir=str(tmp_path), **numbers)
    assert [(type(value), value) for value in (training.lora_alpha, training.lora_r)] == [(int, 16), (int, 8)]
    assert training.report_to == ["jsonl"]
    assert load_recipe(recipe(tmp_path, "lora_targets: [q_proj, v_proj]\n"), [])[1].lora_targets == "q_proj,v_proj"


def test_a_recipe_may_be_absent() -> None:
    stream, training = load_recipe(None, ["--no_cache_images", "--cameras", "agentview", "robot0_eye_in_hand"])
    assert stream.cameras == ["agentview", "robot0_eye_in_hand"]
    assert training.cache_images is False


@pytest.mark.parametrize(
    ("text", "argv", "message"),
    [
        ("lambda_rak: 1\n", [], "unknown option 'lambda_rak'; did you mean lambda_rac"),
        ("", ["--steam=B3-2N1"], "unknown option --steam; did you mean stream"),
        ("", ["--lambda", "1"], "unknown option --lambda"),
        ("- a\n- b\n", [], "must hold `option: value` lines"),
        ("a: [\n", [], "not valid YAML"),
        ("lora_r: eight\n", [], "invalid int value: 'eight'"),
        ("teacher: oracle\n", [], "invalid choice: 'oracle'"),
        ("lora_r:\n", [], "lora_r has no value"),
        ("stream: B3\n", [], "write Bi-kNm"),
        ("seed: [1]\n", [], "seed takes one value, not a list"),
        ("max_steps: 3\n", [], "set base_steps and stage_steps"),
        ("", ["--num_train_epochs", "2"], "set base_steps and stage_steps"),
        ("", ["--seed", "1", "mine.yaml"], "mine.yaml stands behind the options; a recipe comes first"),
        ("", ["--report_to", "jsonl", "mine.yaml"], "mine.yaml stands behind the options; a recipe comes first"),
        ("", ["--foo=mine.yaml"], "unknown option --foo"),
        ("report_to:\n", [], "leave the line out to keep 'none'"),
    ],
)
def test_unusable_recipes_name_the_cure(tmp_path: Path, text: str, argv: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe(recipe(tmp_path, text), argv)


def test_missing_recipe(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no recipe at"):
        load_recipe(tmp_path / "none.yaml")


def test_help_explains_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        load_recipe(None, ["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "--lambda_rac" in text
    assert "Weight of the replay-anchor contrastive term" in " ".join(text.split())
    assert "Bi-kNm: i base tasks" in " ".join(text.split())


def test_the_method_of_the_paper_sets_what_belongs_to_it(tmp_path: Path) -> None:
    config = InfoVLAConfig(output_dir=str(tmp_path), method="infovla_paper")
    assert (config.teacher, config.cmi_mode, config.anchor_bank) == ("previous", "paper", 0)


def test_a_resolved_configuration_is_plain_data_and_reads_back(tmp_path: Path) -> None:
    stream, training = load_recipe(
        None, [f"--output_dir={tmp_path}", "--lora_r=4", "--tasks", "a", "b", "c", "d", "e"]
    )
    values = resolved_config(stream, training)
    assert json.loads(json.dumps(values)) == values == yaml.safe_load(yaml.safe_dump(values))
    assert (values["lora_r"], values["tasks"]) == (4, ["a", "b", "c", "d", "e"])


WEIGHTS = st.floats(0, 10)
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "lambda_rac": WEIGHTS,
        "lambda_output": WEIGHTS,
        "temperature": st.floats(1e-6, 100),
        "counterfactual_share": st.floats(0, 1),
        "counterfactual_frames": st.integers(1, 10**6),
        "teacher": st.sampled_from(["base", "auto", "previous"]),
        "rac_center": st.booleans(),
        "rac_pooling": st.sampled_from([None, "prompt", "vision"]),
        "lora_r": st.integers(1, 512),
        "learning_rate": st.floats(1e-12, 1),
        "seed": st.integers(0, 2**31 - 1),
        "demonstrations": st.integers(1, 1000),
        "tasks": st.lists(st.text("abz_019", min_size=1, max_size=8), min_size=2, max_size=2, unique=True),
        "demonstrations_folder": st.none() | st.text("ab ./é#:'-", min_size=1, max_size=12).filter(str.strip),
    },
)


@settings(max_examples=40, deadline=None)
@given(OPTIONS)
def test_what_a_recipe_says_is_what_is_read(options: dict[str, Any]) -> None:
    text = yaml.safe_dump(options)
    read = resolved_config(*load_recipe({"stream": "B1-1N1", **yaml.safe_load(text)}))
    assert {name: read[name] for name in options} == options
    json.dumps(read, allow_nan=False)


def test_weights_and_temperature_of_a_method_are_its_own_unless_given(tmp_path: Path) -> None:
    def settled(**options: Any) -> tuple[float, float, float]:
        config = InfoVLAConfig(output_dir=str(tmp_path), use_cpu=True, **options)
        return config.lambda_rac, config.lambda_cmi, config.temperature

    assert settled() == (0.02, 0.02, 0.5)
    assert settled(method="infovla_paper") == (0.1, 0.1, 0.1)  # the weights: paper, section 5.1
    assert settled(method="infovla_paper", lambda_rac=0.0, temperature=0.2) == (0.0, 0.1, 0.2)
    assert settled(lambda_cmi=0.5, temperature=0.1) == (0.02, 0.5, 0.1)


def test_an_option_that_the_method_sets_is_not_ignored_without_a_word(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="has teacher='previous' instead of 'base', anchor_bank=0 instead of 5"):
        paper = InfoVLAConfig(output_dir=str(tmp_path), method="infovla_paper", teacher="base", anchor_bank=5)
    assert (paper.teacher, paper.anchor_bank) == ("previous", 0)
    with pytest.warns(UserWarning, match="method='ewc' has adapter_init='continue' instead of 'fresh'"):
        InfoVLAConfig(output_dir=str(tmp_path), method="ewc", adapter_init="fresh")
    for usual in ("previous", "auto"):  # what it sets anyway, and what may be nobody's choice
        InfoVLAConfig(output_dir=str(tmp_path), method="infovla_paper", teacher=usual)
    dataclasses.replace(paper, seed=1)

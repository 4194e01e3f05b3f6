"""The stage loop with random demonstrations and a fake simulator: what is written, resumed, refused."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launcher import launch_two
from safetensors.torch import load_file
from stream_fakes import FRAMES, STREAM, TRAINING, FakePool, install_fakes
from tiny_policy import tiny_policy

from infovla_peft import plan
from infovla_peft.adapter_files import AdapterError
from infovla_peft.config import InfoVLAConfig, StreamConfig
from infovla_peft.consolidation import Consolidation
from infovla_peft.hub import load_policy
from infovla_peft.inference import Policy
from infovla_peft.memory import ReplayMemory
from infovla_peft.plan import Stage, plan_stages
from infovla_peft.preflight import check_batches
from infovla_peft.publishing import check_run
from infovla_peft.results import Results
from infovla_peft.run_folder import RunError, RunFolder
from infovla_peft.simulation import AssetSet
from infovla_peft.stream import Stream
from infovla_peft.verify import verify_run

pytestmark = pytest.mark.libero  # task names and instructions come from LIBERO's package


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Stream]:
    """A factory of small streams over fakes, each in `tmp_path / "run"`."""
    install_fakes(monkeypatch, tmp_path)

    def factory(stream: dict[str, Any] | None = None, **training: Any) -> Stream:
        config = StreamConfig(**{**STREAM, **(stream or {})})
        return Stream(config, InfoVLAConfig(**{**TRAINING, "output_dir": str(tmp_path / "run"), **training}))

    return factory


def snapshot(folder: Path) -> dict[str, bytes]:
    """Contents of all files but those of caches."""
    files = [file for file in folder.rglob("*") if file.is_file() and ".cache" not in file.parts]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def test_the_notation_becomes_stages() -> None:
    stages = plan_stages(
        StreamConfig(stream="B3-2N2", tasks=["7", "1", "2", "put_the_bowl_on_the_plate", "0", "9", "4"])
    )
    assert [[task.index for task in stage.tasks] for stage in stages] == [[7, 1, 2], [8, 0], [9, 4]]
    assert stages[1].name == "stage_01_put_the_bowl_on_the_plate_and_1_more"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stream": "B3-8N1"}, "needs 11 tasks, but libero_goal has 10"),
        ({"stream": "B1-1N1", "tasks": ["turn_on_the_stov", "1"]}, "turn_on_the_stove"),
        ({"stream": "B1-1N1", "tasks": ["7", "turn_on_the_stove"]}, "twice"),
        ({"stream": "B1-1N1", "tasks": ["7", "77"]}, "tasks 0 to 9"),
    ],
)
def test_unknown_tasks_are_explained(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_stages(StreamConfig(**options))


def test_the_time_of_a_step_is_reckoned_from_the_checkpoint_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "_throughput", lambda device: 1e12)
    model = tiny_policy(image_size=64, patch_size=16).model
    model.save_pretrained(tmp_path / "base")
    numbers = sum(parameter.numel() for parameter in model.parameters())
    tokens = 4 * 4 + 24 + 8  # patches, words of a prompt, and its answer
    for base, expected in ((tmp_path / "base", numbers * tokens), ("openvla/openvla-7b", 7.54e9 * (256 + 32))):
        seconds = plan.measure_step(StreamConfig(base_model=str(base)), InfoVLAConfig(use_cpu=True))
        assert seconds == pytest.approx(4 * expected / 0.4e12, rel=1e-3)


def test_a_whole_run(make: Callable[..., Stream], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with make() as stream:
        text = stream.plan()
        stream.run()
    run = tmp_path / "run"
    for part in ("B2-2N1 on libero_goal", "primitive", "stage 2", "4 x 2 rollouts", "3 steps", "together"):
        assert part in text
    results = Results.load(run / "results.json")
    assert [[count is not None for count in row] for row in results.episodes] == [
        [True, True, True],
        [True, True, True],
        [False, True, True],
        [False, False, True],
    ]
    assert results.assets == "primitive"
    assert results.step_cap == 300
    assert results.seed == 42
    assert results.versions["mujoco"]
    assert results.timings[0].keys() == {"demonstrations", "train", "evaluate"}
    assert (run / "report" / "index.html").exists()
    assert (run / "success.csv").exists()
    assert not list(run.glob("stages/*/checkpoint-*"))
    steps = [json.loads(line)["step"] for line in (run / "stages/stage_01/log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]
    adapters = sorted(path.name for path in (run / "adapters").iterdir())
    assert adapters[0].startswith("stage_01_")
    info = json.loads((run / "adapters" / adapters[1] / "infovla.json").read_text())
    assert info["base_model"] == "../../base"
    assert len(info["seen"]) == 4
    policy = load_policy(run)  # the latest adapter
    assert policy.act(np.zeros((24, 24, 3), np.uint8), info["instruction"], np.zeros(8)).shape == (8, 7)

    before = snapshot(run)
    FakePool.calls.clear()
    with make() as stream:
        assert "finished" in stream.plan()
        stream.run()
    assert FakePool.calls == []
    assert snapshot(run) == before


def test_a_killed_evaluation_goes_on_with_the_next_task(
    make: Callable[..., Stream], monkeypatch: pytest.MonkeyPatch
) -> None:
    with make() as stream:
        first, second = stream.stages[0].tasks
        monkeypatch.setattr(FakePool, "fail_at", second.name)
        with pytest.raises(KeyboardInterrupt):
            stream.run()
    assert FakePool.calls == [first.name]
    monkeypatch.setattr(FakePool, "fail_at", None)
    with make() as stream:
        stream.run()
    assert FakePool.calls[:2] == [first.name, second.name]


def test_a_killed_training_goes_on_from_its_checkpoint_with_the_same_result(
    make: Callable[..., Stream], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from infovla_peft.loss_log import LossLog

    with make({"stream": "B1-1N1"}) as stream:
        stream.run()
    run = tmp_path / "run"
    whole = {path.parent.name: load_file(path) for path in run.glob("adapters/*/adapter_model.safetensors")}
    shutil.rmtree(run)

    on_log = LossLog.on_log

    def killed(self: LossLog, args: Any, state: Any, *rest: Any, **options: Any) -> None:
        on_log(self, args, state, *rest, **options)
        if self._stage == 1 and state.global_step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, make({"stream": "B1-1N1"}) as stream:
        patch.setattr(LossLog, "on_log", killed)
        with pytest.raises(KeyboardInterrupt):
            stream.run()
    assert list(run.glob("stages/stage_01/checkpoint-*"))
    shutil.copytree(run / "stages/stage_01/checkpoint-2", run / "stages/stage_01/checkpoint-9")
    (run / "stages/stage_01/checkpoint-9/trainer_state.json").unlink()  # a torn one does not count
    with make({"stream": "B1-1N1"}) as stream:
        stream.run()
    assert len(whole) == 1
    for name, weights in whole.items():
        resumed = load_file(run / "adapters" / name / "adapter_model.safetensors")
        assert all(torch.equal(resumed[key], weights[key]) for key in weights)
    steps = [json.loads(line)["step"] for line in (run / "stages/stage_01/log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]


def test_a_changed_configuration_is_refused_and_harmless_changes_are_not(make: Callable[..., Stream]) -> None:
    with make() as stream:
        stream.record()
    with pytest.raises(RunError, match=r"(?s)lora_r: 2 -> 3.*stage_steps: 3 -> 4"):
        make({"stage_steps": 4}, lora_r=3).__enter__()
    with make({"eval_workers": 5}, save_steps=7, disable_tqdm=False):
        pass


def test_an_option_that_only_another_version_knows_is_no_change(make: Callable[..., Stream], tmp_path: Path) -> None:
    with make() as stream:
        stream.record()
        config = stream.resolved_config()
    for removed, added in (("torch_compile", {}), ("use_cpu", {}), ("", {"of_tomorrow": False})):
        (tmp_path / "run/config.yaml").unlink()
        before = {key: value for key, value in config.items() if key != removed} | added
        with RunFolder(tmp_path / "run") as folder:
            folder.open(before)
        if removed == "use_cpu":  # it is on: its absence may have been another choice
            with pytest.raises(RunError, match="use_cpu: None -> True"):
                make().__enter__()
        else:
            with make():
                pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_targets": "q_projj"}, "lora_targets: no linear layer is named 'q_projj'"),
        ({"tap_layer": 40}, "tap_layer: Layer 40 cannot be tapped: choose 1 to"),
        ({"counterfactual_frames": 2, "teacher": "auto"}, "counterfactual_frames must be at least 3"),
        ({"eval_strategy": "steps"}, "eval_strategy must be no"),
        ({"lora_targets": "lm_head"}, "lora_targets 'lm_head' names no layer that runs"),
        ({"cache_vision_features": True}, "set lora_targets to layers of the language model"),
        ({"method": "er", "cache_vision_features": True, "lora_targets": "q_proj"}, "set image_shift to 0"),
        ({"method": "mir", "cache_vision_features": True, "lora_targets": "q_proj"}, "candidates of method='mir'"),
    ],
)
def test_what_a_later_stage_would_stumble_over_is_said_first(
    make: Callable[..., Stream], tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    """After the base is trained a corrected option would be another run's."""
    with pytest.raises((RunError, ValueError), match=message):
        make(**{"method": "infovla", **options}).__enter__()
    assert not (tmp_path / "run").exists()


def test_each_process_of_mir_needs_samples_of_either_kind(
    make: Callable[..., Stream], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one sample each, half of the processes would have nothing to replay, and fail in the first step."""
    monkeypatch.setattr(InfoVLAConfig, "world_size", property(lambda _: 4))
    for size, fits in ((1, False), (2, True)):
        stream = make(method="mir", per_device_train_batch_size=size)
        refused = pytest.raises(ValueError, match="2 of the 4 samples of a step are replayed")
        with nullcontext() if fits else refused:
            check_batches(stream)
    check_batches(make(method="er", per_device_train_batch_size=1))


def test_parts_of_a_checkpoint_are_known_before_it_is_loaded(make: Callable[..., Stream], tmp_path: Path) -> None:
    with make() as stream:
        stream.record()
        stream.learn_base()
    for file in (tmp_path / "run/base").glob("*.safetensors"):
        file.unlink()
    for options, message in (({"lora_targets": "q_projj"}, "no linear layer"), ({"tap_layer": 9}, "choose 1 to")):
        with pytest.raises((RunError, ValueError), match=message):
            make({"base_model": str(tmp_path / "run/base"), "stream": "B0-1N1"}, **options).__enter__()
    with pytest.raises(KeyError, match="no statistics for 'elsewhere'; set unnorm_key to one of"):
        make({"base_model": str(tmp_path / "run/base"), "stream": "B0-1N1", "unnorm_key": "elsewhere"}).__enter__()
    index = tmp_path / "run/base/model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(RunError, match=r"lacks model-00001-of-00002\.safetensors, which its index"):
        make({"base_model": str(tmp_path / "run/base"), "stream": "B0-1N1"}).__enter__()
    index.unlink()
    with pytest.raises(ValueError, match=r"has no \*\.safetensors, .*Train on one in safetensors"):
        make({"base_model": str(tmp_path / "run/base"), "stream": "B0-1N1"}, push_to_hub=True).__enter__()
    two = ["agentview", "robot0_eye_in_hand"]
    with pytest.raises(RunError, match=r"sees 1 image\(s\), but `cameras` is .*; name as many"):
        make({"base_model": str(tmp_path / "run/base"), "stream": "B0-1N1", "cameras": two}).__enter__()


def test_cached_vision_features_are_the_adapters_stages(make: Callable[..., Stream]) -> None:
    """In the base stage the tower is trained, and nothing is replayed."""
    options = {"cache_vision_features": True, "lora_targets": "q_proj,v_proj", "image_shift": 0}
    with make(method="er", **options) as stream:
        assert not stream.stage_training(stream.stages[0]).cache_vision_features
        assert stream.stage_training(stream.stages[1]).cache_vision_features
        stream.record()
        stream.learn_base()


def test_asset_sets_and_process_counts_are_not_mixed(
    make: Callable[..., Stream], monkeypatch: pytest.MonkeyPatch
) -> None:
    with make() as stream:
        assert stream.resolved_config()["processes"] == 1
    other = AssetSet("official", Path("elsewhere"))
    monkeypatch.setattr("infovla_peft.simulation.find_assets", lambda *_: other)
    with pytest.raises(RunError, match="assets: 'primitive' -> 'official'"):
        make().__enter__()


def test_the_plan_counts_what_is_recorded_already(make: Callable[..., Stream], tmp_path: Path) -> None:
    """Runs that share a folder record once, so that only what the folder lacks takes time."""
    from infovla_peft.data.recorded import DemonstrationManifest, EpisodeRecord, RecordingSettings, TaskRecord

    options = {"demonstrations": 2, "demonstrations_folder": str(tmp_path / "shared"), "demonstration_workers": 1}

    def planned() -> str:
        with make({"stream": "B1-2N1", **options}) as stream:
            return stream.plan()

    def record(*counts: int) -> None:
        tasks = {
            task.name: TaskRecord(
                task.suite,
                task.index,
                task.name,
                task.instruction,
                {index: EpisodeRecord(index, f"{index}", 5, 1, 0) for index in range(count)},
            )
            for task, count in zip(make({"stream": "B1-2N1"}).tasks, counts, strict=True)
        }
        settings = RecordingSettings("primitive", "3", 24, ("agentview",), "fast", 0.0, 0)
        DemonstrationManifest(settings, tasks).save(tmp_path / "shared")

    assert "3 tasks x 2, about 33 s" in planned()
    (tmp_path / "shared").mkdir()
    record(2, 2, 1)
    assert "3 tasks x 2, about 7 s" in planned()
    record(2, 3, 2)
    assert "3 tasks x 2, finished" in planned()
    (tmp_path / "shared" / "manifest.json").write_text("{")
    assert "3 tasks x 2, about 33 s" in planned()


@pytest.mark.parametrize("damage", ["truncated", "missing", "manifest"])
def test_broken_demonstrations_are_named_and_left_alone(
    make: Callable[..., Stream], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    from infovla_peft.data.demonstrations import DemonstrationError, load_demonstrations
    from infovla_peft.data.recorded import DemonstrationManifest, EpisodeRecord, RecordingSettings, TaskRecord

    monkeypatch.setattr("infovla_peft.stream.load_demonstrations", load_demonstrations)
    with make({"stream": "B1-1N1", "demonstrations": 1}) as stream:
        stream.record()
        folder = stream.demonstrations_folder
        shutil.rmtree(folder)
        (folder / "x").mkdir(parents=True)
        records = {
            task.name: TaskRecord(
                task.suite,
                task.index,
                task.name,
                task.instruction,
                {0: EpisodeRecord(0, f"x/{task.name}.parquet", 5, 1, 0)},
            )
            for task in stream.tasks
        }
        settings = RecordingSettings("primitive", "3.3.2", 24, ("agentview",), "fast", 0.1, 0)
        DemonstrationManifest(settings, records).save(folder)
        if damage == "truncated":
            for task in stream.tasks:
                (folder / "x" / f"{task.name}.parquet").write_bytes(b"PAR1 and no more")
        if damage == "manifest":
            (folder / "manifest.json").write_text("{")
        before = snapshot(tmp_path / "run")
        message = {"truncated": "truncated", "missing": "is missing", "manifest": "damaged"}[damage]
        with pytest.raises(DemonstrationError, match=message):
            stream.learn_base()
        assert snapshot(tmp_path / "run") == before


def test_a_missing_predecessor_is_named(make: Callable[..., Stream], tmp_path: Path) -> None:
    with make() as stream:
        stream.record()
        with pytest.raises(RunError, match=r"'base' is not finished.*whole recipe"):
            stream.learn(stream.stages[1])
        stream.learn_base()
        with pytest.raises(RunError, match=r"'remember_01' is not finished.*whole recipe"):
            stream.learn(stream.stages[2])
        stream.remember(stream.stages[0])
        stream.learn(stream.stages[1])
        stream.remember(stream.stages[1])
        shutil.rmtree(tmp_path / "run/adapters" / stream.stages[1].name)
        with pytest.raises(RunError, match=r"learn_01.*finished, but .*stage_01_.* is missing"):
            stream.learn(stream.stages[2])


def test_an_adapter_of_another_base_is_refused(make: Callable[..., Stream], tmp_path: Path) -> None:
    with make() as stream:
        stream.run()
    shutil.copytree(tmp_path / "run", tmp_path / "first")
    shutil.rmtree(tmp_path / "run")
    with make(seed=7) as stream:
        stream.record()
        stream.learn_base()
    adapter = next((tmp_path / "first/adapters").iterdir())
    with pytest.raises(AdapterError, match=r"another base than .* load it with its own base"):
        load_policy(adapter, base=tmp_path / "run/base")


def test_a_base_that_is_no_openvla_is_refused_before_anything_is_written(
    make: Callable[..., Stream], tmp_path: Path
) -> None:
    folder = tmp_path / "llama"
    folder.mkdir()
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        make({"base_model": str(folder)}).__enter__()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=r"is no OpenVLA checkpoint: .* 'llama'"):
        make({"base_model": str(folder)}).__enter__()
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_is_used_as_it_is(make: Callable[..., Stream], tmp_path: Path) -> None:
    with make() as stream:
        stream.record()
        stream.learn_base()
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(tmp_path / "run/base", checkpoint)
    shutil.rmtree(tmp_path / "run")
    before = snapshot(checkpoint)
    with make({"base_model": str(checkpoint), "stream": "B0-1N1"}) as stream:
        stream.run()
    assert snapshot(checkpoint) == before
    results = Results.load(tmp_path / "run/results.json")
    assert [row[0] for row in results.episodes] == [None]
    adapter = next((tmp_path / "run/adapters").iterdir())
    assert load_policy(adapter).instruction == stream.stages[1].tasks[0].instruction


@pytest.mark.parametrize("method", ["der++", "mir", "ewc", "lwf", "multitask", "merge", "infovla", "infovla_paper"])
def test_every_method_runs_through(make: Callable[..., Stream], tmp_path: Path, method: str) -> None:
    options = {"method": method, "counterfactual_frames": 6, "ewc_samples": 3, "teacher": "auto"}
    with make(**options) as stream:
        stream.run()
    results = Results.load(tmp_path / "run/results.json")
    assert results.stages == 3
    assert results.method == method
    frames = 2 * FRAMES if method == "multitask" else FRAMES  # two demonstrations per task were recorded
    assert len(ReplayMemory.load(tmp_path / "run/memory")) == 4 * frames
    assert (tmp_path / "run/stages/stage_02/fisher.safetensors").exists() == (method == "ewc")
    if method == "merge":
        policy = stream.policy(stream.stages[2])
        assert policy.model.peft_config["stage_02"].r == 2 * TRAINING["lora_r"]
        assert not [path for path in verify_run(tmp_path / "run").damage if "merged" in path.parts]
        assert check_run(tmp_path / "run")[-1].folder.parent.name == "merged"
        shutil.rmtree(stream.run_folder.merged(stream.stages[1].name))
        assert [path.name for path in verify_run(tmp_path / "run").damage if path.parent.name == "merged"]
    assert FakePool.calls == [stream.tasks[k].name for k in (0, 1, 0, 1, 2, 0, 1, 2, 3)]


def test_adapters_merged_to_a_rank_are_stored_with_it(make: Callable[..., Stream], tmp_path: Path) -> None:
    with make(method="merge", merge_rank=1) as stream:
        stream.run()
    folder = stream.run_folder.merged(stream.stages[2].name)
    assert {lora.r for lora in load_policy(folder).model.peft_config.values()} == {1}
    assert {
        tensor.shape[0] for name, tensor in load_file(folder / "adapter_model.safetensors").items() if "lora_A" in name
    } == {1}


def test_ewc_weighs_the_tasks_of_the_base_one_by_one(
    make: Callable[..., Stream], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[tuple[int, int]] = []
    measure = Consolidation.measure

    def note(*arguments: Any, **options: Any) -> Consolidation:
        measured.append((options["samples"], options["tasks"]))
        return measure(*arguments, **options)

    monkeypatch.setattr(Consolidation, "measure", note)
    with make(method="ewc", ewc_samples=3) as stream:
        stream.run()
    assert measured == [(6, 2), (3, 1)]  # two tasks of the base, then one


def test_single_task_asks_each_task_its_own_adapter(make: Callable[..., Stream], tmp_path: Path) -> None:
    with make({"final_eval_episodes": 3}, method="single_task") as stream:
        asked: list[tuple[int, list[str]]] = []
        policy = stream.policy

        def note(stage: Stage) -> Policy:
            asked.append((stage.index, []))
            return policy(stage)

        stream.policy = note  # type: ignore[method-assign]
        stream.run()
        names = [task.name for task in stream.tasks]
    # Rollouts of a stage before are taken over, except for the last one, which wants more of them.
    assert FakePool.calls == [*names[:2], names[2], *names]
    assert [index for index, _ in asked] == [0, 1, 0, 1, 2]
    results = Results.load(tmp_path / "run/results.json")
    assert [row[-1] for row in results.episodes] == [3, 3, 3, 3]
    assert results.successes[0][0] == results.successes[0][1]
    two = {file.name: load_file(file / "adapter_model.safetensors") for file in (tmp_path / "run/adapters").iterdir()}
    first, second = two.values()
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_a_full_disk_leaves_earlier_results_as_they_were(
    make: Callable[..., Stream], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with make() as stream:
        stream.record()
        stream.learn_base()
        stream.remember(stream.stages[0])
        stream.measure(stream.stages[0])
    before = snapshot(tmp_path / "run")

    def full(*_args: Any, **_options: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, make() as stream:
        patch.setattr("infovla_peft.adapters.save_file", full)
        with pytest.raises(OSError, match="No space left"):
            stream.learn(stream.stages[1])
    after = snapshot(tmp_path / "run")
    assert {name: after[name] for name in before if name != "memory/anchors.safetensors"} == before
    with make() as stream:
        stream.run()
    assert Results.load(tmp_path / "run/results.json").stages == 3


# Adam divides by the size of a gradient: where that is nothing but rounding, so is the sign of a whole step.
WELL_CONDITIONED: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.1}


def _on_two_processes(folder: str) -> None:
    """What each of two processes runs; fakes are installed by hand, because a fresh process knows no fixture."""
    patch = pytest.MonkeyPatch()
    install_fakes(patch, Path(folder))
    training = InfoVLAConfig(
        **{**TRAINING, **WELL_CONDITIONED, "output_dir": f"{folder}/run", "per_device_train_batch_size": 2}
    )
    config = StreamConfig(**{**STREAM, "stream": "B1-1N1", "eval_episodes": 3, "base_batch_size": 2})
    with Stream(config, training) as stream:
        stream.run()
        assert stream.training.world_size == 2
        assert FakePool.calls == [stream.tasks[k].name for k in (0, 0, 1)]
        assert FakePool.episodes == (6 if stream.run_folder.main_process else 3)  # of 3 x 3, dealt out task by task
    patch.undo()


def test_rollouts_are_as_the_recipe_has_them(make: Callable[..., Stream]) -> None:
    options = {"eval_first_state": 10, "rollout_max_steps": 77, "open_loop_steps": 3, "image_size": 24}
    with make({"stream": "B1-1N1", "renderer": "exact", "eval_episodes": 2, **options}) as stream:
        stream.run()
    assert FakePool.asked
    for asked in FakePool.asked:
        found = {name: asked[name] for name in ("open_loop_steps", "max_steps", "image_size", "renderer", "states")}
        assert found == {
            "open_loop_steps": 3, "max_steps": 77, "image_size": 24, "renderer": "exact", "states": [10, 11]
        }  # fmt: skip
        assert list(asked["cameras"]) == stream.config.cameras
    assert Results.load(stream.run_folder.results).open_loop_steps == 3


def test_the_last_column_may_have_more_rollouts(make: Callable[..., Stream], tmp_path: Path) -> None:
    with make({"stream": "B1-2N1", "eval_episodes": 1, "final_eval_episodes": 3}) as stream:
        text = stream.plan()
        stream.run()
    assert "2 x 1 rollouts" in text
    assert "3 x 3 rollouts" in text
    results = Results.load(tmp_path / "run" / "results.json")
    assert results.episodes == [[1, 1, 3], [None, 1, 3], [None, None, 3]]


def test_two_processes_train_and_roll_out_together_and_one_writes(make: Callable[..., Stream], tmp_path: Path) -> None:
    with make({"stream": "B1-1N1", "eval_episodes": 3}, **WELL_CONDITIONED) as stream:
        stream.run()
    shutil.move(tmp_path / "run", tmp_path / "alone")
    launch_two(Path(__file__), tmp_path)
    alone, together = (Results.load(tmp_path / name / "results.json") for name in ("alone", "run"))
    assert together.episodes == alone.episodes == [[3, 3], [None, 3]]
    assert together.successes == alone.successes
    assert together.config["processes"] == 2
    (adapter,) = (tmp_path / "run/adapters").iterdir()
    theirs = load_file(tmp_path / "alone/adapters" / adapter.name / "adapter_model.safetensors")
    for name, weights in load_file(adapter / "adapter_model.safetensors").items():
        torch.testing.assert_close(weights, theirs[name], atol=1e-5, rtol=0)


if __name__ == "__main__":
    _on_two_processes(sys.argv[1])

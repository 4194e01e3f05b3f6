"""Loading policies: adapters, runs, checkpoints; which one is chosen; what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from infovla_peft import load_policy
from infovla_peft.adapters import AdapterError, AdapterInfo, add_adapter, fingerprint, save_adapter
from infovla_peft.config import InfoVLAConfig
from infovla_peft.data.normalisation import Normaliser
from infovla_peft.hub import find_adapters, instruction_of
from infovla_peft.inference import Policy
from infovla_peft.models.openvla import build_tiny_openvla

STATISTICS = {
    "libero_10": {
        "action": {"q01": [-1.0] * 7, "q99": [1.0] * 7, "mask": [True] * 6 + [False]},
        "proprio": {"q01": [-1.0] * 8, "q99": [1.0] * 8},
    }
}
TASKS = ["open_the_drawer", "KITCHEN_SCENE3_turn_on_the_stove", "close_the_door"]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run: a base that knows task 0, and the adapters of tasks 1 and 2."""
    run = tmp_path_factory.mktemp("hub") / "run"
    model, processor = build_tiny_openvla(
        instructions=["open the drawer"],
        image_size=24,
        vision_width=16,
        vision_depth=2,
        hidden_size=16,
        layers=1,
        heads=2,
        chunk=2,
        norm_stats=STATISTICS,
    )
    model.save_pretrained(run / "base")
    processor.save_pretrained(run / "base")
    base = fingerprint(model)
    config = InfoVLAConfig(output_dir=str(run), lora_r=2, use_cpu=True, report_to="none")
    for stage in (1, 2):
        model = add_adapter(model, f"stage_{stage}", config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(std=0.3)
        info = AdapterInfo(
            base_model="../../base",
            base_fingerprint=base,
            unnorm_key="libero_10",
            task=TASKS[stage],
            instruction=instruction_of(TASKS[stage]),
            suite="libero_10",
            stage=stage,
            seen=TASKS[: stage + 1],
            cameras=["agentview"],
        )
        save_adapter(model, f"stage_{stage}", run / "adapters" / f"stage_{stage:02d}_{TASKS[stage]}", info, STATISTICS)
    return run


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "run"))


def act(policy: Policy, instruction: str | None = "open the drawer") -> list[list[float]]:
    image = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    actions: list[list[float]] = policy.act(image, instruction, np.zeros(8)).tolist()
    return actions


def test_what_is_loaded_from_a_run(original: Path) -> None:
    first, second = (adapter.folder for adapter in find_adapters(original))
    base, one, two = act(load_policy(original / "base")), act(load_policy(first)), act(load_policy(second))
    assert base != one != two != base
    chosen: list[tuple[Callable[[], Policy], list[list[float]]]] = [
        (lambda: load_policy(original), two),
        (lambda: load_policy(original, stage=0), base),
        (lambda: load_policy(original, stage=1), one),
        (lambda: load_policy(original, task="Turn on the stove"), one),
        (lambda: load_policy(original, task="close_the_door"), two),
        (lambda: load_policy(original, task="open the drawer"), base),
        (lambda: load_policy(original, task="open the drawer", stage=2), two),
    ]
    for load, expected in chosen:
        assert act(load()) == expected


def test_the_task_gives_the_instruction(original: Path) -> None:
    assert load_policy(original).instruction is None
    assert load_policy(original, task=TASKS[1]).instruction == "turn on the stove"
    assert load_policy(find_adapters(original)[1].folder).instruction == "close the door"
    policy = load_policy(original, task="open the drawer")
    assert act(policy, None) == act(policy)


def test_the_statistics_come_with_the_adapter(run: Path) -> None:
    adapter = find_adapters(run)[0].folder
    before = load_policy(adapter)
    wide = json.loads(json.dumps(STATISTICS))
    wide["libero_10"]["action"]["q99"] = [3.0] * 7
    (adapter / "dataset_statistics.json").write_text(json.dumps(wide))
    after = load_policy(adapter)
    assert isinstance(after.normaliser, Normaliser)
    normalised = np.array(act(before))[:, :6]  # of bounds [-1, 1]
    np.testing.assert_allclose(np.array(act(after))[:, :6], (normalised + 1) * 2 - 1, atol=1e-5)


def test_a_base_elsewhere_must_be_the_same_base(run: Path, tmp_path: Path) -> None:
    adapter = find_adapters(run)[0].folder
    expected = act(load_policy(adapter))
    shutil.move(run / "base", tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match="put it back, or give load_policy its place"):
        load_policy(adapter)
    assert act(load_policy(adapter, base=tmp_path / "moved")) == expected
    other, processor = build_tiny_openvla(
        instructions=["x"],
        image_size=24,
        vision_width=16,
        vision_depth=2,
        hidden_size=16,
        layers=1,
        heads=2,
        chunk=2,
        seed=1,
    )
    other.save_pretrained(tmp_path / "other")
    processor.save_pretrained(tmp_path / "other")
    with pytest.raises(AdapterError, match="another base"):
        load_policy(adapter, base=tmp_path / "other")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "juggle"}, "has learned no task 'juggle'"),
        ({"stage": 7}, "no adapter of stage 7; it has: stage 1, KITCHEN_SCENE3"),
        ({"stage": 1, "task": "close the door"}, "has learned no task"),
    ],
)
def test_an_unknown_choice_lists_what_there_is(original: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_policy(original, **options)  # type: ignore[arg-type]


def test_damaged_or_missing_files_are_named(run: Path, tmp_path: Path) -> None:
    adapter = find_adapters(run)[0].folder
    (adapter / "dataset_statistics.json").write_text("{")
    with pytest.raises(AdapterError, match=r"dataset_statistics\.json is damaged"):
        load_policy(adapter)
    (adapter / "dataset_statistics.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"dataset_statistics\.json is missing"):
        load_policy(adapter)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no adapter"):
        load_policy(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        load_policy(tmp_path / "absent")


def test_a_hub_id_without_network_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="check the name, the network"):
        load_policy("nobody/infovla-absent")


def test_a_hub_id_goes_through_the_snapshot(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name: str(original))
    assert act(load_policy("somebody/infovla-test", stage=1)) == act(load_policy(original, stage=1))

"""A small finished run, as `Stream` leaves it: a base that knows one task, two adapters, results, figures, a video."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from infovla_peft.adapter_files import AdapterInfo
from infovla_peft.adapters import add_adapter, fingerprint, save_adapter
from infovla_peft.config import InfoVLAConfig
from infovla_peft.inference import Policy
from infovla_peft.models.openvla import build_tiny_openvla
from infovla_peft.report import write_report
from infovla_peft.results import Results, TaskEntry, Video
from infovla_peft.task_names import instruction_of

STATISTICS = {
    "libero_10": {
        "action": {"q01": [-1.0] * 7, "q99": [1.0] * 7, "mask": [True] * 6 + [False]},
        "proprio": {"q01": [-1.0] * 8, "q99": [1.0] * 8},
    }
}
TASKS = ["open_the_drawer", "KITCHEN_SCENE3_turn_on_the_stove", "close_the_door"]
SHAPE: dict[str, int] = {
    "image_size": 24,
    "vision_width": 16,
    "vision_depth": 2,
    "hidden_size": 16,
    "layers": 1,
    "heads": 2,
    "chunk": 2,
}


def build_run(run: Path, *, rank: int = 2, seed: int = 0) -> Path:
    """Base and adapters of a run, without results."""
    model, processor = build_tiny_openvla(instructions=["open the drawer"], **SHAPE, norm_stats=STATISTICS, seed=seed)
    model.save_pretrained(run / "base")
    processor.save_pretrained(run / "base")
    base = fingerprint(model)
    config = InfoVLAConfig(output_dir=str(run), lora_r=rank, use_cpu=True, report_to="none")
    for stage in (1, 2):
        model = add_adapter(model, f"stage_{stage}", config)
        draw = torch.Generator().manual_seed(stage)
        for parameter in model.parameters():
            if parameter.requires_grad:  # small, so that actions stay near their range, and rounding small with them
                parameter.data.normal_(std=0.1, generator=draw)
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


def add_results(
    run: Path, *, stages: int = 3, secret: str = "", report: bool = True, assets: str = "primitive"
) -> Results:
    """results.json, the report and one video per stage; the last task of the last stage was not measured."""
    results = Results(
        method="infovla",
        stream="B1-2N1",
        suite="libero_10",
        seed=0,
        base_model="tiny",
        teacher="base",
        assets=assets,
        renderer="fast",
        step_cap=520,
        open_loop_steps=8,
        tasks=[TaskEntry(name, instruction_of(name), stage) for stage, name in enumerate(TASKS)],
        versions={"torch": "2.13.0"},
        config={"output_dir": str(run), "seed": 0, "hub_token": secret or None},
    )
    cells = {TASKS[0]: (9, 10), TASKS[1]: (6, 10), TASKS[2]: (3, 10)}
    for stage in range(stages):
        video = run / "videos" / f"stage_{stage:02d}" / f"{TASKS[0]}_00_success.mp4"
        video.parent.mkdir(parents=True, exist_ok=True)
        video.write_bytes(b"a rollout of stage %d" % stage)
        measured = {task: cells[task] for task in TASKS[: stage + 1] if (task, stage) != (TASKS[0], 2)}
        path = video.relative_to(run).as_posix()
        results.add_stage(stage, measured, videos=[Video(path, TASKS[0], stage, True)])
    results.save(run / "results.json")
    if report:
        write_report(run)
    return results


def act(policy: Policy, instruction: str | None = "open the drawer") -> list[list[float]]:
    """Actions on one fixed observation."""
    image = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    actions: list[list[float]] = policy.act(image, instruction, np.zeros(8)).tolist()
    return actions

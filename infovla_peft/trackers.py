"""What a tracker is shown of a stage beside the loss curves: success, the matrix as a picture, rollouts as videos.

The loss curves go through `report_to` of 🤗 Trainer. This adds, to the trackers that can show it:

| tracker     | success, metrics | matrix          | rollouts        |
|-------------|------------------|-----------------|-----------------|
| tensorboard | scalars          | image           | animated images |
| wandb       | scalars          | image           | video           |
| trackio     | scalars          | image           | video           |
| jsonl       | numbers          | path of the PNG | paths of MP4s   |

`jsonl` is no tracker of Trainer's: it writes `tracking.jsonl` into the run's folder, one line per event, and needs
nothing installed. Other trackers of Trainer's get the loss curves alone.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import io
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from .config import InfoVLAConfig
from .files import write_text
from .results import Results

JSONL = "jsonl"
INSTALL = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}
FRAMES_OF_AN_ANIMATION = 40
"""At most so many in TensorBoard, which keeps each in its event file."""


@dataclass(frozen=True)
class StageRecord:
    """What is shown of one stage.

    Attributes:
        stage: 0 = base.
        scalars: name -> value; rates in [0, 1].
        images: name -> PNG.
        videos: name -> MP4.
    """

    stage: int
    scalars: dict[str, float] = field(default_factory=dict)
    images: dict[str, Path] = field(default_factory=dict)
    videos: dict[str, Path] = field(default_factory=dict)


def stage_record(results: Results, stage: int, run: Path) -> StageRecord:
    """Gather the record of a stage that is measured.

    Args:
        results: of the run.
        run: its folder, where the report's figures and the videos are.
    """
    success = results.success[:, stage]
    scalars = {
        f"success/{task.name}": float(rate)
        for task, rate in zip(results.tasks, success, strict=True)
        if not math.isnan(rate)
    }
    if scalars:
        scalars["success/mean"] = sum(scalars.values()) / len(scalars)
    if stage == results.stages - 1:
        scalars |= {f"metrics/{name}": value for name, value in results.metrics().items() if not math.isnan(value)}
    figures = {name: run / "report" / f"{name}.png" for name in ("success_matrix", "success_by_stage")}
    videos = {Path(video.path).stem: run / video.path for video in results.videos if video.stage == stage}
    return StageRecord(
        stage,
        scalars,
        {name: path for name, path in figures.items() if path.is_file()},
        {name: path for name, path in videos.items() if path.is_file()},
    )


class Tracker(Protocol):
    """One place that shows records."""

    def log(self, record: StageRecord) -> None: ...


class JsonlTracker:
    """`tracking.jsonl`: a stage that is measured again replaces its line."""

    def __init__(self, run: Path) -> None:
        self._run, self._path = run, run / "tracking.jsonl"

    def log(self, record: StageRecord) -> None:
        lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
        kept = [line for line in lines if json.loads(line)["stage"] != record.stage]
        paths = {
            kind: {name: path.relative_to(self._run).as_posix() for name, path in getattr(record, kind).items()}
            for kind in ("images", "videos")
        }
        kept.append(json.dumps({"stage": record.stage, "scalars": record.scalars, **paths}, allow_nan=False))
        write_text(self._path, "".join(f"{line}\n" for line in kept))


class TensorBoardTracker:
    """Event files in `tensorboard/stream` of the run; each stage's loss curves are beside it."""

    def __init__(self, run: Path) -> None:
        self._folder = tensorboard_folder(run) / "stream"

    def log(self, record: StageRecord) -> None:
        from PIL import Image
        from tensorboard.compat.proto.summary_pb2 import Summary
        from torch.utils.tensorboard import SummaryWriter

        writer: Any = SummaryWriter(log_dir=str(self._folder))
        try:
            for name, value in record.scalars.items():
                writer.add_scalar(name, value, record.stage)
            encoded = {name: path.read_bytes() for name, path in record.images.items()}
            encoded |= {f"rollouts/{name}": animation(path) for name, path in record.videos.items()}
            for name, data in encoded.items():
                width, height = Image.open(io.BytesIO(data)).size
                image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=data)
                writer._get_file_writer().add_summary(
                    Summary(value=[Summary.Value(tag=name, image=image)]), record.stage
                )
        finally:
            writer.close()


class MediaTracker:
    """wandb or trackio, whose `init`, `log`, `Image` and `Video` are alike.

    Args:
        module: `wandb` or `trackio`.
        start: arguments of its `init`, used where no run of it is open.
    """

    def __init__(self, module: Any, start: dict[str, Any]) -> None:
        self._module, self._start = module, start

    def log(self, record: StageRecord) -> None:
        if self._module.__name__ == "wandb" and self._module.run is not None:
            self._module.finish()  # that of the stage's loss curves, which Trainer leaves open
        run = self._module.init(**self._start)
        try:
            content: dict[str, Any] = {"stage": record.stage, **record.scalars}
            content |= {name: self._module.Image(str(path)) for name, path in record.images.items()}
            content |= {
                f"rollouts/{name}": self._module.Video(str(path), format="mp4") for name, path in record.videos.items()
            }
            self._module.log(content)
        finally:
            run.finish()


def make_trackers(training: InfoVLAConfig, run: Path) -> list[Tracker]:
    """Those of `training.report_to` that show more than curves.

    Raises:
        ValueError, ImportError: see `check_trackers`.
    """
    check_trackers(training.report_to)
    trackers: list[Tracker] = []
    for name in _names(training.report_to):
        if name == JSONL:
            trackers.append(JsonlTracker(run))
        elif name == "tensorboard":
            trackers.append(TensorBoardTracker(run))
        elif name in ("wandb", "trackio"):
            module = importlib.import_module(name)
            start: dict[str, Any] = {"name": f"{training.run_name or run.name}-stream", "resume": "allow"}
            # Where Trainer's callback has put the loss curves.
            if name == "wandb":
                project = os.getenv("WANDB_PROJECT") or training.project
                start |= {"project": project, "id": _identity(run), "dir": str(run)}
            else:
                start |= {
                    "project": training.project,
                    "space_id": training.trackio_space_id,
                    "bucket_id": training.trackio_bucket_id,
                    "private": training.hub_private_repo,
                }
            trackers.append(MediaTracker(module, start))
    return trackers


def check_tracker_names(report_to: str | Sequence[str] | None) -> None:
    """A ValueError if no tracker has one of these names."""
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    for name in _names(report_to):
        if name not in (JSONL, *INTEGRATION_TO_CALLBACK):
            known = ", ".join([JSONL, *INTEGRATION_TO_CALLBACK])
            raise ValueError(f"report_to names {name!r}, which is not a tracker; choose among {known}, or none")


def check_trackers(report_to: str | Sequence[str] | None) -> None:
    """See that what is asked for is there, before anything is spent.

    Raises:
        ValueError: no tracker has this name.
        ImportError: it is not installed; the message has the command.
    """
    check_tracker_names(report_to)
    for name in _names(report_to):
        if name in INSTALL and importlib.util.find_spec(name) is None:
            raise ImportError(f"report_to names {name}, which is not installed: pip install {INSTALL[name]}")


def trainer_report_to(report_to: str | Sequence[str] | None) -> list[str]:
    """What Trainer is told: the same without `jsonl`."""
    return [name for name in _names(report_to) if name != JSONL]


def tensorboard_folder(run: Path) -> Path:
    return run / "tensorboard"


@contextmanager
def curves_beside(run: Path, stage: str, project: str | None) -> Iterator[None]:
    """While a stage trains, Trainer's curves go where the stage's results will: TensorBoard's to `tensorboard/<stage>`
    of the run, wandb's to `project`. What the environment says comes first.
    """
    # The only way that Trainer leaves: its TensorBoard knows no folder, and its wandb not TrainingArguments.project.
    wanted = {"TENSORBOARD_LOGGING_DIR": str(tensorboard_folder(run) / stage), "WANDB_PROJECT": project}
    added = {name: value for name, value in wanted.items() if value and not os.environ.get(name)}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def animation(path: Path) -> bytes:
    """An MP4 as an animated GIF of at most `FRAMES_OF_AN_ANIMATION` frames."""
    import av

    with av.open(str(path)) as container:
        rate = float(container.streams.video[0].average_rate or 1)
        frames = [frame.to_image() for frame in container.decode(video=0)]
    step = math.ceil(len(frames) / FRAMES_OF_AN_ANIMATION)
    buffer = io.BytesIO()
    frames[0].save(
        buffer, format="GIF", save_all=True, append_images=frames[step::step], duration=1000 * step / rate, loop=0
    )
    return buffer.getvalue()


def _names(report_to: str | Sequence[str] | None) -> list[str]:
    names = [report_to] if isinstance(report_to, str) else list(report_to or [])
    return [name for name in names if name != "none"]


def _identity(run: Path) -> str:
    """The same for a run and its continuation."""
    return hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:16]

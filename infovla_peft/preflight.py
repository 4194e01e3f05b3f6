"""What a stream checks before its first step: that machine, base and recipe have what every later step needs.

A stream runs for hours; what would fail in its last stage fails here.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig

from .adapters import attach, target_modules
from .data.demonstrations import CAMERA_COLUMNS
from .data.normalisation import Normaliser
from .data.sampling import replay_places
from .engine import check_engine, is_sharded
from .methods import METHODS
from .models.openvla import OpenVLAForActionPrediction, build_tiny_openvla
from .models.openvla.quantization import quantization_config
from .plan import tiny_shape
from .publishing import check_publishable_base
from .reading import read_json
from .run_folder import RunError
from .trackers import check_tracker_names, check_trackers
from .video import CURE, video_available
from .vision_cache import check_cacheable

if TYPE_CHECKING:
    from .stream import Stream


def check_start(stream: Stream) -> None:
    """See that a stream can start on this machine, and end.

    Raises:
        RunError, ValueError: it cannot; something is missing, or does not fit.
    """
    from .simulation.headless import choose_gl, libero_folder

    libero_folder()
    choose_gl()
    if stream.config.videos_per_task and not video_available():
        raise RunError(f"videos of rollouts need PyAV: {CURE}")
    quantization_config(stream.config.quantization)
    check_recipe(stream)
    check_engine(stream.training, sharded=is_sharded(stream.training))
    _check_base(stream)
    check_trackers(stream.training.report_to)  # that they are installed, too
    check_batches(stream)


def _check_base(stream: Stream) -> None:
    """See that the base has what options name of it: built without memory, if it is a checkpoint."""
    from .models.openvla.checkpoint import read_config

    if stream.is_tiny:
        words = [task.instruction for task in stream.tasks]
        model, _ = build_tiny_openvla(instructions=words, **tiny_shape(stream.config))
    else:
        checkpoint, _ = read_config(stream.config.base_model, {"images": len(stream.config.cameras)})
        if checkpoint.num_images_in_input != len(stream.config.cameras):
            raise RunError(
                f"{stream.config.base_model} sees {checkpoint.num_images_in_input} image(s), but `cameras` is "
                f"{stream.config.cameras}; name as many"
            )
        _check_checkpoint(stream, checkpoint)
        with torch.device("meta"):
            model = OpenVLAForActionPrediction(checkpoint)
    try:
        model.tap_module(stream.training.tap_layer)
    except ValueError as error:
        raise RunError(f"tap_layer: {error}") from error
    targets = target_modules(model, stream.training.lora_targets)
    if stream.training.cache_vision_features:
        adapted = attach(model, "stage", LoraConfig(r=1, target_modules=targets), empty=True)
        method = METHODS[stream.training.method]
        replays = method.replay and (method.keeps_all or stream.config.memory_trajectories > 0)
        check_cacheable(adapted, stream.training, replayed_anew=replays and not method.has_teacher)


def _check_checkpoint(stream: Stream, config: Any) -> None:
    """See that a base's weights are all there, if it is here, and that it has the statistics that are asked for."""
    from .models.openvla.checkpoint import read_statistics

    folder, key = Path(stream.config.base_model), stream.config.unnorm_key
    if stream.training.push_to_hub and folder.is_dir():
        check_publishable_base(folder)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        content = read_json(index, error=RunError, cure="copy the base again")
        shards = content.get("weight_map") if isinstance(content, dict) else None
        lost = sorted({str(name) for name in (shards or {}).values() if not (folder / str(name)).is_file()})
        if lost:
            raise RunError(f"the base {folder} lacks {', '.join(lost)}, which its index names; copy it again")
    statistics = read_statistics(stream.config.base_model, {}) or config.norm_stats if key else None
    if statistics:
        Normaliser(statistics, key, bounds=config.action_normalization)


def check_recipe(stream: Stream) -> None:
    """See that the recipe fits together, as far as it says so itself: what `--dry-run` checks, on any machine.

    Raises:
        RunError, ValueError: it does not; a later stage would fail.
    """
    config, method = stream.config, METHODS[stream.training.method]
    if config.analyse and method.keeps_all:
        raise RunError(
            f"analyse looks at demonstrations that are not trained on, and {stream.training.method} trains on all; "
            "leave analyse out (in a benchmark: `analyse: false` below this method's name in `methods`)"
        )
    unknown = set(config.cameras) - set(CAMERA_COLUMNS)
    if unknown or not config.cameras:
        raise RunError(f"cameras must be among {', '.join(CAMERA_COLUMNS)}, got {config.cameras}")
    check_tracker_names(stream.training.report_to)
    for name in ("base_model", "demonstrations_source"):
        place = getattr(config, name)
        if not place or not place.startswith((".", "/", "~")) or Path(place).exists():
            continue
        if name == "base_model" or "demonstrations" not in stream.run_folder.state():  # else they may be gone
            raise RunError(f"{name}: there is nothing at {place}; correct the path")
    if stream.training.per_device_train_batch_size < 1:
        raise RunError("per_device_train_batch_size must be at least 1")
    if stream.training.eval_strategy != "no":
        raise RunError("eval_strategy must be no: a stream holds no samples out; its rollouts evaluate each stage")


def check_batches(stream: Stream) -> None:
    """See that a batch of all processes can hold what the last stage replays.

    Raises:
        ValueError: it cannot.
    """
    config, training, method = stream.config, stream.training, METHODS[stream.training.method]
    past = [task for stage in stream.stages[:-1] for task in stage.tasks]
    remembered = past if method.replay and (method.keeps_all or config.memory_trajectories) else []
    answered = stream.stages[0].tasks if training.teacher == "base" else past
    counterfactual = answered if method.counterfactual and training.counterfactual_share else []
    if len(counterfactual) > training.counterfactual_frames:
        raise ValueError(f"counterfactual_frames must be at least {len(counterfactual)}, one per past task")
    batch = training.train_batch_size * training.world_size
    replayed = replay_places(batch, training.replay_fraction, len(remembered or counterfactual))
    if method.retrieves and min(replayed, batch - replayed) < training.world_size:
        raise ValueError(
            f"method={training.method!r} chooses in each process what to replay beside the new task's samples: "
            f"{replayed} of the {batch} samples of a step are replayed, and each of {training.world_size} processes "
            "needs one of either kind; raise per_device_train_batch_size, or change replay_fraction"
        )

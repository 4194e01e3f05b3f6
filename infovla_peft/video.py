"""Rollouts as MP4 files."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from .files import atomic_file

CURE = "pip install 'infovla-peft[video]', or ask for no videos (videos_per_task 0, of `infovla evaluate` --videos 0)"


def video_available() -> bool:
    """Whether PyAV, which writes the files, is installed."""
    return importlib.util.find_spec("av") is not None


def check_video() -> None:
    """An ImportError that names the cure, unless videos can be written."""
    if not video_available():
        raise ImportError(f"writing videos needs PyAV: {CURE}")


def write_video(
    path: str | os.PathLike[str], frames: Sequence[NDArray[np.uint8]], *, frames_per_second: float = 20.0
) -> None:
    """Write upright uint8 RGB frames (H, W, 3) as H.264 that browsers play; odd sizes lose one row or column.

    Args:
        path: target file, written atomically; its folder is made.
        frames: at least one frame, all of one size.
        frames_per_second: of playback. LIBERO acts at 20 Hz.

    Raises:
        ImportError: PyAV is not installed.
        ValueError: no frames, or frames of different shapes.
    """
    check_video()
    import av

    if not frames or any(frame.shape != frames[0].shape or frame.dtype != np.uint8 for frame in frames):
        raise ValueError("a video needs at least one frame, and all frames uint8 RGB of one shape (H, W, 3)")
    height, width = (side // 2 * 2 for side in frames[0].shape[:2])  # yuv420p halves both sides
    with atomic_file(path) as temporary, av.open(str(temporary), "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(frames_per_second).limit_denominator(1000))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": "20"}
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame[:height, :width]), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())

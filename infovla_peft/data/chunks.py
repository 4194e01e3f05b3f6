"""Demonstrations as training samples: a frame, its instruction, and the chunk of actions that follows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from PIL import Image

from ..bars import progress_bar
from .images import ImagePipeline
from .normalisation import check_gripper, to_model_action
from .rows import DemonstrationError, check_table

IMAGE_CACHE_LIMIT = 2**30
"""Bytes of decoded images that are kept. Decoding 32 frames of 112 pixels anew takes about 25 ms of one core, a few
per cent of a step of the tiny model; the 47,000 frames of ten tasks would take 1.8 GB, and as much again per process.
"""
_COLUMNS = ("state", "action", "instruction", "task", "episode_index", "frame_index")


@dataclass(frozen=True)
class Samples:
    """A batch before normalisation and tokenising.

    Attributes:
        images: (B, cameras, 3, side, side) uint8.
        states: (B, P) float32, proprioception.
        actions: (B, T, A) float32, the model's convention, not normalised.
        instructions: B texts.
        shifts: (B, 2) pixels to move the images by; None for none.
        proprio_noise: (B, P), added to the normalised proprioception; None for none.
        replay: of the replay samples, the last ones of the batch, their rows in the table of anchors; None without
            replay.
    """

    images: NDArray[np.uint8]
    states: NDArray[np.float32]
    actions: NDArray[np.float32]
    instructions: list[str]
    shifts: NDArray[np.int64] | None = None
    proprio_noise: NDArray[np.float32] | None = None
    replay: ReplayRows | None = None

    def __len__(self) -> int:
        return len(self.states)


@dataclass(frozen=True)
class ReplayRows:
    """Which memory frames a batch replays, as (view, row) of the table of anchors.

    Attributes:
        own: (R, 2), this process's.
        peers: (S, 2), those of the other processes in the same step.
    """

    own: NDArray[np.int64]
    peers: NDArray[np.int64]


class FrameTable(Protocol):
    """Rows that samplers and the teacher can address: `ChunkDataset` and `CounterfactualDataset`.

    Attributes:
        states: (N, P).
        tasks: names; task: (N,), each row's number among them.
        trajectory, frame: (N,), which moment of which recording; trajectories are numbered over the table.
    """

    states: NDArray[np.float32]
    tasks: list[str]
    task: NDArray[np.int64]
    frame: NDArray[np.int64]

    @property
    def trajectory(self) -> NDArray[np.int64]: ...

    def __len__(self) -> int: ...

    def __getitems__(self, rows: Sequence[int] | NDArray[np.int64]) -> Samples: ...


class ChunkDataset(torch.utils.data.Dataset[Samples]):
    """Samples out of the frames of demonstrations, gathered a batch at a time.

    A frame's chunk is its own action and those that follow; beyond the end of the episode the last action is repeated.
    `dataset[i]` gives the `Samples` of one frame, `dataset.__getitems__(rows)`, which a `DataLoader` calls, of many.

    Args:
        frames: rows of demonstrations, episode after episode (columns: state, action, instruction, task,
            episode_index, frame_index, and the images).
        pipeline: resizes the images to the model's input.
        chunk: T, actions per sample.
        cameras: image columns the model sees, in its order.
        cache_images: decode everything now and keep it (3 · side² bytes per image) if it takes no more than
            `IMAGE_CACHE_LIMIT`. Else images are decoded batch by batch from the memory-mapped frames; the samples are
            the same.

    Raises:
        ValueError: `frames` is a stream, a column is missing, there are no frames, an episode's frames are not in
            order, or values are not finite.
        DemonstrationError: the gripper is in another convention than LIBERO's, see `normalisation.check_gripper`.
    """

    def __init__(
        self,
        frames: datasets.Dataset,
        pipeline: ImagePipeline,
        *,
        chunk: int = 8,
        cameras: Sequence[str] = ("image",),
        cache_images: bool = True,
    ) -> None:
        check_table(frames)
        missing = [name for name in (*_COLUMNS, *cameras) if name not in frames.column_names]
        if missing or not len(frames):
            raise ValueError(
                f"demonstrations lack {', '.join(missing)}; they have {', '.join(frames.column_names)}"
                if missing
                else "there are no demonstrations to train on"
            )
        self.frames, self.pipeline, self.chunk = frames, pipeline, chunk
        self.cameras, self.cache_images = tuple(cameras), cache_images
        columns = frames.select_columns(list(_COLUMNS)).with_format("arrow")[:]
        self.states = _vectors(columns["state"])  # (N, P)
        self.env_actions = _vectors(columns["action"])  # (N, A), LIBERO's
        if not (np.isfinite(self.states).all() and np.isfinite(self.env_actions).all()):
            raise ValueError("the demonstrations hold NaN or infinite actions or states; record them again")
        check_gripper(self.env_actions)  # here too: a base that has statistics needs none of these frames
        self.tasks, self.task = _index(columns["task"])  # names, (N,)
        self.instructions, self._instruction = _index(columns["instruction"])
        self.frame = columns["frame_index"].to_numpy().astype(np.int64)  # (N,)
        episode = columns["episode_index"].to_numpy().astype(np.int64)
        self.episode, self._last = _episodes(self.task, episode, self.frame)
        del columns
        pa.default_memory_pool().release_unused()
        cached = cache_images and len(self) * len(self.cameras) * 3 * pipeline.side**2 <= IMAGE_CACHE_LIMIT
        self._images = self._decode_all() if cached else None

    def __len__(self) -> int:
        return len(self.states)

    @property
    def trajectory(self) -> NDArray[np.int64]:
        return self.episode

    @property
    def num_episodes(self) -> int:
        return int(self.episode[-1]) + 1

    def like(self, frames: datasets.Dataset) -> ChunkDataset:
        """Other frames, prepared in the same way."""
        return ChunkDataset(
            frames, self.pipeline, chunk=self.chunk, cameras=self.cameras, cache_images=self.cache_images
        )

    def __getitem__(self, row: int) -> Samples:
        return self.__getitems__([row])

    def __getitems__(self, rows: Sequence[int] | NDArray[np.int64]) -> Samples:
        index = np.asarray(rows, dtype=np.int64)  # (B,)
        following = np.minimum(index[:, None] + np.arange(self.chunk), self._last[index][:, None])  # (B, T)
        return Samples(
            images=self._images[index] if self._images is not None else self._decode(index),
            states=self.states[index],
            actions=to_model_action(self.env_actions[following]),
            instructions=[self.instructions[number] for number in self._instruction[index]],
        )

    def _decode(self, index: NDArray[np.int64]) -> NDArray[np.uint8]:
        with _named_pictures():
            return self._resize(self.frames.select_columns(list(self.cameras))[index.tolist()])

    def _decode_all(self) -> NDArray[np.uint8]:
        images = np.empty((len(self), len(self.cameras), 3, self.pipeline.side, self.pipeline.side), dtype=np.uint8)
        batches = self.frames.select_columns(list(self.cameras)).iter(batch_size=256)
        with (
            _named_pictures(),
            progress_bar(total=len(self), desc="decoding frames", unit="frame", delay=2, leave=False) as bar,
        ):
            first = 0  # not the bar's count, which stands still where nobody watches it
            for batch in batches:
                decoded = self._resize(batch)
                images[first : first + len(decoded)] = decoded
                first += len(decoded)
                bar.update(len(decoded))
        return images

    def _resize(self, batch: dict[str, Any]) -> NDArray[np.uint8]:
        return np.stack([self.pipeline.resize([_image(image) for image in batch[name]]) for name in self.cameras], 1)


def concatenate(first: Samples, second: Samples) -> Samples:
    """Two batches as one; only the frames' own content."""
    return replace(
        first,
        images=np.concatenate((first.images, second.images)),
        states=np.concatenate((first.states, second.states)),
        actions=np.concatenate((first.actions, second.actions)),
        instructions=first.instructions + second.instructions,
    )


@contextmanager
def _named_pictures() -> Iterator[None]:
    """Pillow says what is wrong with a picture, but not of what it is nor what helps."""
    try:
        yield
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise DemonstrationError(
            f"a picture of the demonstrations cannot be decoded ({error!s:.200}): record or copy them again"
        ) from error


def _image(value: Any) -> Image.Image:
    return value if isinstance(value, Image.Image) else Image.fromarray(np.asarray(value))


def _vectors(column: pa.ChunkedArray) -> NDArray[np.float32]:
    """A column of lists of numbers as an array (N, numbers)."""
    lengths = pc.unique(pc.list_value_length(column)).to_pylist()
    if lengths != lengths[:1] or lengths[0] is None:
        raise ValueError(f"the demonstrations' actions or states have {' or '.join(map(str, lengths))} numbers each")
    numbers = pc.list_flatten(column).to_numpy().astype(np.float32)
    return numbers.reshape(len(column), lengths[0])  # type: ignore[no-any-return]


def _index(texts: pa.ChunkedArray) -> tuple[list[str], NDArray[np.int64]]:
    """The different texts in the order of their first appearance, and each row's number among them."""
    encoded = pc.dictionary_encode(texts).unify_dictionaries()
    rows = np.concatenate([chunk.indices.to_numpy() for chunk in encoded.chunks])
    return encoded.chunk(0).dictionary.to_pylist(), rows.astype(np.int64)


def _episodes(
    task: NDArray[np.int64], episode: NDArray[np.int64], frame: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Number the episodes in their order; each row's number, and the row of its episode's last frame."""
    begins = np.r_[True, (np.diff(task) != 0) | (np.diff(episode) != 0)]
    out_of_order = ~begins[1:] & (np.diff(frame) != 1)
    if out_of_order.any() or len({*zip(task[begins], episode[begins], strict=True)}) != begins.sum():
        row = int(np.argmax(out_of_order)) + 1 if out_of_order.any() else 0
        raise ValueError(
            f"the demonstrations are not in order (row {row}: frame {frame[row]} of episode {episode[row]}); "
            "sort them by task, episode_index and frame_index"
        )
    number = np.cumsum(begins) - 1
    last = np.r_[np.flatnonzero(begins)[1:] - 1, len(task) - 1]
    return number, last[number]

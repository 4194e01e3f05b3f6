"""Readers of demonstrations (HDF5, Parquet, MP4) and of what lies beside an adapter, for `fuzz_readers`."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets
import pytest
from data_files import write_lerobot, write_libero_hdf5
from fuzz_harness import Reader
from fuzz_readers import make_adapter
from test_demonstrations import TASKS, FakeDemonstrator, write

from infovla_peft.adapter_files import (
    INFO,
    PEFT_CONFIG,
    STATISTICS,
    AdapterError,
    check_adapter,
    read_lora,
    read_statistics,
)
from infovla_peft.data import recording
from infovla_peft.data.demonstrations import load_demonstrations
from infovla_peft.data.normalisation import Normaliser
from infovla_peft.data.recorded import DemonstrationManifest
from infovla_peft.data.rows import DemonstrationError
from infovla_peft.integrity import checksums, write_sealed

TASK = ["turn_on_the_stove"]


def void(_made: object) -> None: ...


def stream(folder: Path, **options: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder.parent / "cache")
        for row in load_demonstrations(folder, streaming=True, **options):
            assert len(row["action"]) == 7
            assert len(row["state"]) == 8


def make_recorded(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recording, "Demonstrator", FakeDemonstrator)
        write(folder, TASKS[:1], 1)


def read_beside_adapter(folder: Path) -> None:
    check_adapter(folder / "adapter")
    Normaliser(read_statistics(folder / "adapter"), "libero_goal")
    read_lora(folder / "adapter")


def reseal_adapter(folder: Path) -> None:
    """As if somebody had written these files: the checksums are right."""
    reseal(folder / "adapter" / INFO)


def reseal(file: Path) -> None:
    with suppress(ValueError, AttributeError, KeyError, TypeError, OSError, RecursionError):  # it is no JSON any more
        content = json.loads(file.read_text())
        files = [file.parent / name for name in content.pop("sha256") if name != file.name]
        write_sealed(file, content, checksums(files, file.parent))


BAD = (DemonstrationError, FileNotFoundError)
DATA_READERS = (
    Reader("demonstrations (LIBERO's HDF5)", lambda folder: void(write_libero_hdf5(folder, TASK, 1)), stream,
           ["*.hdf5"], BAD),
    Reader("demonstrations (LeRobot's Parquet)", lambda folder: void(write_lerobot(folder, episodes=1, videos=False)),
           stream, ["**/*.parquet", "meta/info.json"], BAD),
    Reader("demonstrations (LeRobot's MP4)",
           lambda folder: void(write_lerobot(folder, episodes=1, cameras=["observation.images.image"])), stream,
           ["**/*.mp4"], BAD),
    Reader("manifest.json", make_recorded, lambda folder: void(DemonstrationManifest.load(folder)), ["manifest.json"],
           BAD, reseal=lambda folder: reseal(folder / "manifest.json")),
    Reader("adapter_config.json", make_adapter, read_beside_adapter, [f"adapter/{PEFT_CONFIG}"], (AdapterError,),
           reseal=reseal_adapter),
    Reader("dataset_statistics.json", make_adapter, read_beside_adapter, [f"adapter/{STATISTICS}"],
           (AdapterError, ValueError), reseal=reseal_adapter),
)  # fmt: skip

"""The Hub of local_hub.py as a program of its own, for commands in other processes; what it stores stays in a folder.

python tests/local_hub.py --port 0 --folder hub --user me

It prints three lines for the shell, and serves until it is stopped; started again on the same folder, it has what was
pushed before.

export HF_ENDPOINT=http://127.0.0.1:PORT
export HF_TOKEN=hf_...
export HF_HUB_DISABLE_XET=1     # huggingface_hub never asks a Hub whether it takes uploads by Xet; this one does not
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import threading
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from local_hub import Commit, Entry, LocalHub, Repository


class KeptHub(LocalHub):
    """A `LocalHub` whose repositories and collections lie in a folder: hub.json, and every file by its SHA-256."""

    def __init__(self, folder: Path, port: int = 0) -> None:
        super().__init__(port)
        self._folder = folder
        (folder / "blobs").mkdir(parents=True, exist_ok=True)
        if not (folder / "hub.json").is_file():
            return
        kept = json.loads((folder / "hub.json").read_text(encoding="utf-8"))
        self.blobs = {file.name: file.read_bytes() for file in (folder / "blobs").iterdir() if len(file.name) == 64}
        self.collections = kept["collections"]
        for name, content in kept["repositories"].items():
            commits = {
                sha: Commit(**{**commit, "files": {path: Entry(*each) for path, each in commit["files"].items()}})
                for sha, commit in content["commits"].items()
            }
            self.repositories[name] = Repository(content["private"], commits, content["branches"])

    def changed(self) -> None:
        for sha256, data in self.blobs.items():
            if not (self._folder / "blobs" / sha256).is_file():
                _write(self._folder / "blobs" / sha256, data)
        repositories = {name: asdict(repository) for name, repository in self.repositories.items()}
        content = json.dumps({"repositories": repositories, "collections": self.collections}, indent=1)
        _write(self._folder / "hub.json", content.encode())


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f"{path.name}.new")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def main(argv: Sequence[str] | None = None) -> None:
    """Serve until Ctrl-C or SIGTERM."""
    parser = argparse.ArgumentParser(description="A Hub on this machine, for push, list and load.")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--folder", type=Path, required=True, help="where what is pushed stays")
    parser.add_argument("--user", default="me", help="whose token is printed")
    options = parser.parse_args(argv)
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    with KeptHub(options.folder, options.port) as hub:
        said = {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token(options.user), "HF_HUB_DISABLE_XET": "1"}
        print("\n".join(f"export {name}={value}" for name, value in said.items()), flush=True)
        stopped.wait()

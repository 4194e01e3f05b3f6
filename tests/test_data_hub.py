"""Demonstrations by their Hub id, through the unmodified client, from a server that speaks the part it asks for."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from data_files import FRAMES, write_lerobot

COMMIT = "c" * 40


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """Its address, and the files it was asked for. It holds `user/robot`, a LeRobot data set."""
    root = write_lerobot(tmp_path / "robot")
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path in [f"/api/datasets/user/robot/revision/{revision}" for revision in ("main", COMMIT)]:
                names = [file.relative_to(root).as_posix() for file in sorted(root.rglob("*")) if file.is_file()]
                info = {"id": "user/robot", "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
                return self.answer(200, json.dumps(info).encode(), {"Content-Type": "application/json"})
            if path.startswith("/api/datasets/user/robot/tree/"):
                files = [file for file in sorted(root.rglob("*")) if file.is_file()]
                tree = [
                    {
                        "type": "file",
                        "path": file.relative_to(root).as_posix(),
                        "size": file.stat().st_size,
                        "oid": "0",
                    }
                    for file in files
                ]
                return self.answer(200, json.dumps(tree).encode(), {"Content-Type": "application/json"})
            prefix = f"/datasets/user/robot/resolve/{'main' if '/main/' in path else COMMIT}/"
            file = root / path.removeprefix(prefix)
            if not path.startswith(prefix) or not file.is_file():
                return self.answer(404, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "no such repository"})
            if self.command == "GET":
                asked.append(file.relative_to(root).as_posix())
            data = file.read_bytes()
            return self.answer(200, data, {"ETag": hashlib.sha1(data).hexdigest(), "X-Repo-Commit": COMMIT})

        def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_arguments: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}", asked
        httpd.shutdown()
        thread.join()


CODE = """
import json
from infovla_peft import load_demonstrations
rows = iter(load_demonstrations("user/robot", ["turn on the stove"], streaming=True))
first = next(rows)
from infovla_peft.data.sources import Location
assert Location(None, "user/robot").stamp("meta/info.json") == "c" * 40
print(json.dumps({"first": first["action"], "size": first["image"].size, "rows": 1 + len(list(rows))}, default=float))
try:
    load_demonstrations("user/absent", streaming=True)
except FileNotFoundError as error:
    print(error)
"""


def test_a_hub_id_is_streamed_and_then_read_without_a_network(tmp_path: Path, server: tuple[str, list[str]]) -> None:
    endpoint, asked = server
    environment = {
        **{name: value for name, value in os.environ.items() if name.lower() not in ("http_proxy", "https_proxy")},
        "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0",
        "INFOVLA_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(REPOSITORY),
    }  # fmt: skip
    command = [sys.executable, "-c", CODE]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    content, refused = done.stdout.splitlines()
    found = json.loads(content)
    assert (found["size"], found["rows"], len(found["first"])) == ([32, 32], 2 * FRAMES, 7)
    assert "user/absent is no folder here, and the Hub did not list it" in refused
    assert len(asked) == len(set(asked)) == 5  # info, episodes, data, two videos: each once; tasks and stats never
    for without_network in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        again = subprocess.run(
            command, check=False, capture_output=True, text=True, env={**environment, **without_network}
        )
        assert again.returncode == 0, again.stderr
        assert again.stdout.splitlines()[0] == content
    assert len(asked) == 5

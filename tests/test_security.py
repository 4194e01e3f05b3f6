"""Nothing that a file says is executed, no token is kept or shown, and what data says is text in the report."""

from __future__ import annotations

import ast
import json
import os
import pickle
import re
import time
import traceback
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_results import example

import infovla_peft
from infovla_peft.config import InfoVLAConfig, StreamConfig, resolved_config
from infovla_peft.integrity import DamagedFileError, read_sealed
from infovla_peft.reading import read_json, read_yaml
from infovla_peft.report import write_report
from infovla_peft.results import TaskEntry
from infovla_peft.run_folder import RunError, RunFolder

REPOSITORY = Path(infovla_peft.__file__).resolve().parent.parent
SOURCES = sorted([*(REPOSITORY / "infovla_peft").rglob("*.py"), *(REPOSITORY / "recipes").rglob("*.py")])
TOKEN = "hf_" + "x" * 34
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle"}
FORBIDDEN_CALLS = {
    "eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load",
    "pickle.load", "pickle.loads", "torch.hub.load", "np.load", "numpy.load", "__import__",
}  # fmt: skip


def findings(source: str) -> list[str]:
    """What of a module's source may execute what a file or an argument says."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [f"import {name.name}" for name in node.names if name.name.split(".")[0] in FORBIDDEN_MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in FORBIDDEN_MODULES:
            found.append(f"from {node.module} import")
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            options = {option.arg: ast.unparse(option.value) for option in node.keywords}
            if name in FORBIDDEN_CALLS:
                found.append(f"{name}()")
            if name == "torch.load" and options.get("weights_only") != "True":
                found.append("torch.load without weights_only=True")
            if options.get("shell", "False") != "False":
                found.append(f"{name}(shell=...)")
            if options.get("trust_remote_code", "False") not in ("False", "None"):
                found.append(f"{name}(trust_remote_code=...)")
            if options.get("allow_pickle", "False") != "False":
                found.append(f"{name}(allow_pickle=...)")
    return found


def test_the_package_executes_no_data() -> None:
    assert len(SOURCES) > 80
    assert {str(file): found for file in SOURCES if (found := findings(file.read_text(encoding="utf-8")))} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from dill import loads",
        "eval(text)",
        "import yaml\nyaml.load(text, Loader=yaml.Loader)",
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "subprocess.run(command, shell=True)",
        "os.system(command)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "np.load(file, allow_pickle=True)",
    ],
)
def test_the_scan_finds_what_it_looks_for(source: str) -> None:
    assert findings(source)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("a: !!python/name:os.system", "could not determine a constructor"),
        ("seed: 0\nseed: 1", "the key 'seed' is given twice"),
        ("a: &a [*a]", "contains itself"),
        (
            "a: &a [x]\n" + "".join(f"{c}: &{c} [{', '.join([f'*{chr(ord(c) - 1)}'] * 30)}]\n" for c in "bcdefg"),
            "aliases",
        ),
        ("a: " + "[" * 2000, "nested deeper|recursion"),
        ("a: .inf", "no finite number"),
        ("a: 2020-99-99", "month must be"),
        ("a: " + "9" * 5000, "too large"),
    ],
)
def test_yaml_is_plain_and_bounded(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(RunError, match=message) as error:
        read_yaml(tmp_path / "x.yaml", error=RunError, cure="write another")
    assert "x.yaml" in str(error.value)
    assert str(error.value).endswith("write another")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 2}', "the key 'a' is given twice"),
        ('{"a": NaN}', "NaN is not allowed"),
        ('{"a": 1e999}', "too large"),
        ('{"a": ' + "9" * 5000 + "}", "too large"),
        ("[" * 100 + "]" * 100, "nested deeper"),
        ('{"a": "\\ud800"}', "surrogates not allowed"),
        ("", "Expecting value"),
    ],
)
def test_json_is_strict_and_bounded(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(RunError, match=message):
        read_json(tmp_path / "x.json", error=RunError, cure="write another")


def test_a_folder_or_a_pipe_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no regular file"):
        read_json(tmp_path, error=RunError, cure="give a file")


@pytest.mark.parametrize("read", [read_json, read_yaml])
def test_nothing_lies_below_a_file(tmp_path: Path, read: Any) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError, match=r"there is no .*file/x: .* is a file; name a folder"):
        read(tmp_path / "file" / "x", error=RunError, cure="restore it")


def test_tokens_are_kept_nowhere(tmp_path: Path) -> None:
    training = InfoVLAConfig(output_dir=str(tmp_path / "run"), use_cpu=True, hub_token=TOKEN, report_to="none")
    config = resolved_config(StreamConfig(), training)
    assert TOKEN not in json.dumps(config)
    with RunFolder(tmp_path / "run").open(config):
        pass
    with pytest.raises(RunError) as error, RunFolder(tmp_path / "run").open({**config, "seed": 1}):
        pass
    assert TOKEN not in str(error.value)
    assert TOKEN not in str(training)
    assert TOKEN not in repr(training)
    assert TOKEN.encode() not in pickle.dumps(training)  # as in Trainer's training_args.bin
    assert training.hub_token == TOKEN
    kept = [file for file in tmp_path.rglob("*") if file.is_file() and TOKEN in file.read_text(encoding="utf-8")]
    assert kept == []


@pytest.mark.parametrize(
    "command",
    [["--hub_token", TOKEN], [f"--hub_token={TOKEN}"], ["--push_to_hub_token", TOKEN],
     [f"--push_to_hub_token={TOKEN}"], ["--hub-token", f"an-old-one-{TOKEN}"], ["--note", f"mine is {TOKEN}"]],
)  # fmt: skip
def test_a_token_of_the_command_line_is_kept_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["infovla", "train", "x.yaml", *command, "--seed", "3"])
    config = {"seed": 3}
    with RunFolder(tmp_path).open(config):
        lock = (tmp_path / ".lock").read_text(encoding="utf-8")
        with pytest.raises(RunError, match="another process is using") as error:
            RunFolder(tmp_path).open(config)
    for text in (lock, str(error.value)):
        assert "infovla train x.yaml" in text
        assert "--seed 3" in text
        assert "***" in text
        assert "xxx" not in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"hub_token: [{TOKEN}", r"but got '<stream end>' \(line 1, column 50\)"),
        (f"hub_token: {TOKEN}: x", r"mapping values are not allowed here \(line 1, column 49\)"),
        (f"seed: 0\nhub_token: '{TOKEN}", r"unexpected end of stream \(line 2, column"),
        (f"hub_token: !!int {TOKEN}", "invalid literal for int"),
        (f"hub_token: !!bool {TOKEN}", "is not valid YAML: '...'"),
        (f"hub_token: !{TOKEN} x", "could not determine a constructor"),
        (f"hub_token: *{TOKEN}", "undefined alias"),
    ],
)
def test_a_token_of_a_recipe_is_not_in_a_message(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(RunError, match=message) as error:
        read_yaml(tmp_path / "x.yaml", error=RunError, cure="write another")
    assert "xxx" not in "".join(traceback.format_exception(error.value)).lower()


def test_many_keys_are_compared_in_one_pass(tmp_path: Path) -> None:
    """As many as fit: comparing each with each would take minutes."""
    keys = [f"k{number}" for number in range(200_000)]
    (tmp_path / "x.json").write_text(json.dumps(dict.fromkeys(keys))[:-1] + ', "k199999": 1}')
    (tmp_path / "x.yaml").write_text("\n".join(f"{key}: 1" for key in [*keys[:20_000], "k19999"]))
    start = time.process_time()
    with pytest.raises(RunError, match="the key 'k199999' is given twice"):
        read_json(tmp_path / "x.json", error=RunError, cure="write another")
    with pytest.raises(RunError, match="the key 'k19999' is given twice"):
        read_yaml(tmp_path / "x.yaml", error=RunError, cure="write another")
    assert time.process_time() - start < 30


def test_sealed_files_are_bounded(tmp_path: Path) -> None:
    with pytest.raises(DamagedFileError, match="no regular file"):
        read_sealed(tmp_path, newest=2)
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(DamagedFileError, match="no regular file"):
        read_sealed(tmp_path / "pipe.json", newest=2)
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate((64 << 20) + 1)
    with pytest.raises(DamagedFileError, match="larger than 64 MiB"):
        read_sealed(tmp_path / "large.json", newest=2)


class _Tags(HTMLParser):
    """Tags of a page, and attributes that run code."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.handlers: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.handlers += [
            name for name, value in attrs if name.startswith("on") or (value or "").lower().startswith("javascript:")
        ]


def test_the_report_escapes_what_data_says(tmp_path: Path) -> None:
    attack = "\"><script>alert(1)</script><img src=x onerror='alert(2)'>"
    plain, hostile = example(), example()
    hostile.tasks = [TaskEntry(task.name, f"{attack} {task.instruction}", task.learned_at) for task in plain.tasks]
    hostile.method = hostile.base_model = hostile.suite = hostile.renderer = hostile.commit = attack
    hostile.versions = {"python": attack}
    hostile.config = {attack: attack, "tasks": [attack]}
    hostile.timings = [{attack: 1.0} for _ in hostile.timings]
    hostile.videos = [
        replace(video, path=f"videos/{attack.replace(':', '').replace('/', '')}.mp4") for video in plain.videos
    ]
    pages = {}
    for name, results in (("plain", plain), ("hostile", hostile)):
        folder = tmp_path / name
        for video in results.videos:
            (folder / video.path).parent.mkdir(parents=True, exist_ok=True)
            (folder / video.path).write_bytes(b"")
        results.save(folder / "results.json")
        pages[name] = _Tags()
        pages[name].feed(write_report(folder).read_text(encoding="utf-8"))
    assert set(pages["hostile"].tags) == set(pages["plain"].tags)
    assert pages["hostile"].tags.count("script") == pages["plain"].tags.count("script")
    assert pages["hostile"].tags.count("img") == pages["plain"].tags.count("img")
    assert pages["hostile"].handlers == pages["plain"].handlers


def test_the_workflow_is_pinned() -> None:
    """Actions by commit, never by a tag that may move; and it runs the README's test command."""
    workflow = yaml.safe_load((REPOSITORY / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8"))
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    used = [step["uses"] for step in steps if "uses" in step]
    assert used
    assert all(re.fullmatch(r"[\w.-]+/[\w./-]+@[0-9a-f]{40}", name) for name in used), used
    assert workflow["permissions"] == {"contents": "read"}
    assert any("tests/run.sh" in step.get("run", "") for step in steps)

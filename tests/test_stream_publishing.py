"""A stream with `push_to_hub`: one commit per stage, by its own doing and not the Trainer's; failures stop nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from local_hub import LocalHub
from stream_fakes import STREAM, TRAINING, FakePool, install_fakes

from infovla_peft.config import InfoVLAConfig, StreamConfig
from infovla_peft.hub import list_adapters, load_policy
from infovla_peft.remote import HubError
from infovla_peft.run_folder import RunFolder
from infovla_peft.stream import Stream

pytestmark = [
    pytest.mark.libero,  # task names and instructions come from LIBERO's package
    pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload:DeprecationWarning"),  # huggingface_hub's own
]


def stream(folder: Path, *, options: dict[str, Any] | None = None, **training: Any) -> Stream:
    config = StreamConfig(**{**STREAM, "stream": "B1-3N1", "base_steps": 1, "stage_steps": 1, **(options or {})})
    options = {**TRAINING, "output_dir": str(folder), "push_to_hub": True, "hub_model_id": "me/goal", **training}
    return Stream(config, InfoVLAConfig(**options))


def test_a_stream_pushes_after_every_stage(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install_fakes(monkeypatch, tmp_path)
    monkeypatch.setattr("infovla_peft.remote.time.sleep", lambda _seconds: None)
    monkeypatch.setattr("infovla_peft.measurement.write_report_apart", lambda _folder: None)  # figures take seconds
    token = hub.token("me")
    run = tmp_path / "run"
    publish, seen = Stream.publish, []

    def watched(self: Stream, stage: Any) -> None:
        if stage.index == 2:
            hub.fail("POST", "/commit/", 403)
        publish(self, stage)
        seen.append([one.stage for one in list_adapters("me/goal", token=token)])

    monkeypatch.setattr(Stream, "publish", watched)
    with stream(run, hub_token=token, hub_private_repo=True) as running:
        running.run()
    assert seen == [
        [],
        [1],
        [1],
        [1, 2, 3],
    ]  # the push of stage 2 failed, and that of stage 3 carried it
    assert list(hub.repositories) == ["me/goal"]
    assert hub.repositories["me/goal"].private
    titles = [commit.title for commit in hub.repositories["me/goal"].log()]
    assert [title.split(": ")[-1] for title in titles] == ["stages 1 to 3 of 3", "stage 1 of 3", "initial commit"]
    said = capsys.readouterr()
    assert "stage 2 is not pushed yet (me/goal: the token may not do this" in said.out
    written = [file for folder in (run, tmp_path / "cache") for file in folder.rglob("*") if file.is_file()]
    assert not [file for file in written if token.encode() in file.read_bytes()]
    assert token not in said.out + said.err
    info = json.loads(hub.file("me/goal", "infovla.json"))
    assert info["stream"] == "B1-3N1"
    assert [task["stage"] for task in info["tasks"]] == [0, 1, 2, 3]
    assert info["prompt"].endswith("to {instruction}?\nOut:")
    assert info["image_pipeline"] == {
        "rendered_size": 128, "input_sizes": [24], "resize": "resize-naive", "center_crop": False
    }  # fmt: skip
    assert info["statistics"] == {"file": "dataset_statistics.json", "key": "libero_goal"}
    assert info["taps"] == {"layer": -1, "pooling": "action"}
    assert {"torch", "peft", "transformers"} <= set(info["versions"])
    assert load_policy("me/goal", token=token).tasks == [task["name"] for task in info["tasks"]]

    FakePool.calls.clear()
    commits = hub.asked("POST", "/commit/")
    with stream(run, hub_token=token, hub_private_repo=True) as running:  # the same command again: nothing to do
        running.run()
    assert FakePool.calls == []
    assert hub.asked("POST", "/commit/") == commits


def test_the_last_push_carries_the_figures_of_the_analysis(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_fakes(monkeypatch, tmp_path)
    monkeypatch.setattr("infovla_peft.measurement.write_report_apart", lambda _folder: None)  # figures take seconds
    token = hub.token("me")

    def run() -> list[str]:
        with stream(tmp_path / "run", hub_token=token, options={"stream": "B1-1N1", "analyse": True}) as running:
            running.run()
        return [commit.title.split(": ")[-1] for commit in hub.repositories["me/goal"].log()]

    def stopped(_: Stream) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as stop:
        stop.setattr(Stream, "_analyse", stopped)
        with pytest.raises(KeyboardInterrupt):
            run()
    assert not [name for name in hub.files("me/goal") if name.startswith("stage_")]
    assert run() == ["stage 1 of 1", "initial commit"]
    assert {"figures/affinity.png", "figures/cka.png"} < set(hub.files("me/goal"))
    assert len(run()) == 2


def test_an_analysis_that_is_asked_for_later_is_pushed_too(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_fakes(monkeypatch, tmp_path)
    monkeypatch.setattr("infovla_peft.measurement.write_report_apart", lambda _folder: None)
    token = hub.token("me")

    def run(*, analyse: bool) -> int:
        options = {"stream": "B1-1N1", "analyse": analyse}
        with stream(tmp_path / "run", hub_token=token, options=options) as running:
            running.run()
        return len(hub.repositories["me/goal"].log()) - 1

    assert [run(analyse=False), run(analyse=False)] == [1, 1]
    assert "figures/cka.png" not in hub.files("me/goal")
    assert [run(analyse=True), run(analyse=True), run(analyse=False)] == [2, 2, 2]
    assert "figures/cka.png" in hub.files("me/goal")

    with RunFolder(tmp_path / "run") as folder:  # of a version that analysed after its last push: left as it is
        note = folder.state()["push_01"]
        folder.mark("push_01", note["seconds"], commit=note["commit"])
    assert run(analyse=True) == 2


def test_a_token_that_may_not_push_is_named_before_anything_is_trained(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_fakes(monkeypatch, tmp_path)
    with (
        pytest.raises(HubError, match="the token may not do this"),
        stream(tmp_path / "run", hub_token=hub.token("other")),
    ):
        pass
    with pytest.raises(HubError, match="not signed in to the Hub"), stream(tmp_path / "run"):
        pass
    assert not (tmp_path / "run").exists()

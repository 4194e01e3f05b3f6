"""Pushing a run, listing and loading it again: against a Hub on this machine, through the unmodified client."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import libero_installed
from huggingface_hub import HfApi, ModelCard, parse_eval_result_entries, snapshot_download
from local_hub import LocalHub
from tiny_run import TASKS, act, add_results, build_run

from infovla_peft import create_collection, list_adapters, load_policy, push_to_hub
from infovla_peft.adapter_files import AdapterError, read_info, write_info
from infovla_peft.cards import LIBERO, card, template_path
from infovla_peft.cli import main
from infovla_peft.hub import relative_base
from infovla_peft.library import find_adapters
from infovla_peft.models.openvla import load_openvla
from infovla_peft.publishing import check_access, check_run, prepare
from infovla_peft.remote import RETRIES, HubError, explained, retried
from infovla_peft.results import Results
from infovla_peft.run_folder import RunFolder

# huggingface_hub's own, where it uploads by LFS.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload:DeprecationWarning")
REPO = "me/infovla-test"
SECRET = "hf_thisisasecretthatmustnotshow"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = build_run(tmp_path_factory.mktemp("publishing") / "run")
    add_results(run, secret=SECRET)
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses between attempts are not waited for."""
    monkeypatch.setattr("time.sleep", lambda _seconds: None)


def push(hub: LocalHub, run: Path, **options: Any) -> Any:
    return push_to_hub(run, REPO, **{"token": hub.token("me"), **options})


# --- push ---


def test_what_somebody_else_pushes_meanwhile_is_not_overwritten(
    hub: LocalHub, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(hub, run)
    add_results(run, stages=2)
    upload = HfApi.preupload_lfs_files

    def meanwhile(self: HfApi, *arguments: Any, **options: Any) -> Any:
        hub.put(REPO, {"results.json": b"{}"})
        return upload(self, *arguments, **options)

    monkeypatch.setattr(HfApi, "preupload_lfs_files", meanwhile)
    with pytest.raises(HubError, match="changed at the same time; give the command again"):
        push(hub, run)
    assert hub.file(REPO, "results.json") == b"{}"


def test_private_is_refused_where_the_repository_is_public(hub: LocalHub, finished: Path) -> None:
    push(hub, finished)
    before = hub.repositories[REPO].branches["main"]
    with pytest.raises(HubError, match="is there already, and public, so nothing was pushed as private; make it"):
        push(hub, finished, private=True, commit_message="secret")
    with pytest.raises(HubError, match="and public"):
        check_access(REPO, finished, private=True, token=hub.token("me"))
    assert hub.repositories[REPO].branches["main"] == before
    hub.repositories[REPO].private = True
    push(hub, finished, private=True)


def test_a_push_is_one_commit_with_everything(hub: LocalHub, finished: Path) -> None:
    done = push(hub, finished)
    assert done.changed
    assert [commit.sha for commit in hub.repositories[REPO].log()][:-1] == [done.commit]
    files = hub.files(REPO)
    adapter = ["adapter_config.json", "adapter_model.safetensors", "dataset_statistics.json", "infovla.json"]
    for folder in ("", "stage_01/", "stage_02/"):
        assert {f"{folder}{name}" for name in adapter} <= set(files)
    assert hub.file(REPO, "adapter_model.safetensors") == hub.file(REPO, "stage_02/adapter_model.safetensors")
    assert hub.file(REPO, "stage_01/adapter_model.safetensors") != hub.file(REPO, "adapter_model.safetensors")
    assert {"README.md", "results.json", "figures/success_matrix.png"} <= set(files)
    assert ".eval_results/libero.yaml" not in files  # one task was not measured, so there is no mean
    assert [name for name in files if name.endswith(".mp4")] == ["videos/open_the_drawer.mp4"]
    assert hub.file(REPO, "videos/open_the_drawer.mp4") == b"a rollout of stage 2"
    assert "base/model.safetensors" in files
    assert not push(hub, finished).changed  # the same again is no commit
    assert len(hub.repositories[REPO].log()) == 2


def test_what_is_published_names_no_secret_and_no_folder_of_this_machine(hub: LocalHub, finished: Path) -> None:
    token = hub.token("me")
    push(hub, finished)
    for path in hub.files(REPO):
        content = hub.file(REPO, path)
        for private in (token, SECRET, str(finished)):
            assert private.encode() not in content, path
    assert "SECRET" not in json.dumps(json.loads(hub.file(REPO, "results.json"))["config"])


def test_a_later_push_adds_stages_and_takes_away_what_is_gone(hub: LocalHub, run: Path) -> None:
    add_results(run, stages=2)
    push(hub, run)
    assert not [name for name in hub.files(REPO) if name.startswith("stage_02")]
    first = hub.repositories[REPO].branches["main"]
    hub.put(REPO, {"notes.txt": b"mine", "figures/old.png": b"an old figure"})
    add_results(run)
    push(hub, run, commit_message="both stages")
    files = hub.files(REPO)
    assert "stage_02/infovla.json" in files
    assert "notes.txt" in files
    assert "figures/old.png" not in files
    assert hub.repositories[REPO].log()[0].title == "both stages"
    assert "stage_02/infovla.json" not in hub.files(REPO, first)  # the old revision is what it was


def test_private_branch_and_base_of_its_own(hub: LocalHub, finished: Path) -> None:
    push(hub, finished, private=True, revision="draft", base_repo="me/base")
    repository = hub.repositories[REPO]
    assert repository.private
    assert len(repository.log("main")) == 1
    assert len(repository.log("draft")) == 2
    info = json.loads(hub.file(REPO, "infovla.json", "draft"))
    assert info["base_model"] == "me/base"
    assert info["base_revision"] == hub.repositories["me/base"].branches["main"]
    assert not [name for name in hub.files(REPO, "draft") if name.startswith("base/")]
    config = json.loads(hub.file(REPO, "adapter_config.json", "draft"))
    assert (config["base_model_name_or_path"], config["revision"]) == ("me/base", info["base_revision"])
    text = hub.file(REPO, "README.md", "draft").decode()
    assert re.search(rf'load_policy\("{REPO}", task="[^"]+", revision="draft"\)', text)
    assert f'PeftModel.from_pretrained(base, "{REPO}", revision="draft")' in " ".join(text.split())
    policy = load_policy(REPO, revision="draft", token=hub.token("me"))
    assert act(policy) == act(load_policy(finished))
    with pytest.raises(FileNotFoundError, match="or you have no access to it"):
        load_policy(REPO, revision="draft")


def test_the_licence_is_the_owner_s(hub: LocalHub, finished: Path) -> None:
    def licence() -> Any:
        return ModelCard(hub.file(REPO, "README.md").decode()).data.license

    push(hub, finished)
    assert licence() == "apache-2.0"
    push(hub, finished, license="mit")
    assert licence() == "mit"
    assert not push(hub, finished).changed  # a later push keeps it
    changed = hub.file(REPO, "README.md").replace(b"license: mit", b"license: llama2")
    hub.put(REPO, {"README.md": changed})  # on the repository's page
    push(hub, finished)
    assert licence() == "llama2"


def test_a_base_of_its_own_that_cannot_be_is_refused_before_anything_is_made(hub: LocalHub, run: Path) -> None:
    with pytest.raises(ValueError, match="cannot hold the adapters and, at its root too, the base"):
        push(hub, run, base_repo=REPO)
    for adapter in find_adapters(run):
        write_info(adapter.folder, replace(adapter.info, base_model="me/base"))
    with pytest.raises(ValueError, match="is me/base, which is published already; leave out base_repo"):
        push(hub, run, base_repo="me/another")
    assert not hub.repositories


def test_what_the_hub_refuses_of_the_base_is_said_of_its_repository(hub: LocalHub, finished: Path) -> None:
    with pytest.raises(HubError, match=r"^somebody/base: the token may not do this"):
        push(hub, finished, base_repo="somebody/base")


# --- what goes wrong ---


@pytest.mark.parametrize(
    ("method", "pattern", "status"),
    [
        ("POST", "/api/repos/create", 503),
        ("POST", "/preupload/", 429),
        ("PUT", "/lfs/", 503),
        ("POST", "/commit/", 503),
        ("POST", "/commit/", 429),
    ],
)
def test_an_overloaded_hub_is_asked_again(
    hub: LocalHub, finished: Path, method: str, pattern: str, status: int
) -> None:
    hub.fail(method, pattern, status, times=2, headers={"Retry-After": "0"})
    assert push(hub, finished).changed
    assert len(hub.repositories[REPO].log()) == 2


def test_a_connection_cut_in_an_upload_is_taken_up_again(hub: LocalHub, finished: Path) -> None:
    hub.cut("PUT", "/lfs/", times=2)
    assert push(hub, finished).changed
    assert len(hub.repositories[REPO].log()) == 2


def test_an_interrupted_push_leaves_the_old_revision_and_resumes(hub: LocalHub, run: Path) -> None:
    add_results(run, stages=2)
    before = push(hub, run).commit
    add_results(run)
    hub.fail("POST", "/commit/", 503, times=99)
    with pytest.raises(HubError, match=r"the Hub fails \(503\); give the command again later, it continues"):
        push(hub, run)
    assert hub.repositories[REPO].branches["main"] == before
    assert [adapter.stage for adapter in list_adapters(REPO)] == [1]
    hub.heal()
    uploads = hub.asked("PUT", "/lfs/")
    assert push(hub, run).changed
    assert hub.asked("PUT", "/lfs/") == uploads  # everything had been uploaded by the push that failed
    assert [adapter.stage for adapter in list_adapters(REPO)] == [1, 2]


def test_a_commit_whose_answer_was_lost_is_not_made_twice(hub: LocalHub, finished: Path) -> None:
    hub.lose("POST", "/commit/")
    done = push(hub, finished)
    assert done.changed
    assert done.commit == hub.repositories[REPO].branches["main"]
    assert len(hub.repositories[REPO].log()) == 2


def test_what_is_pushed_between_two_attempts_is_not_overwritten(hub: LocalHub, run: Path) -> None:
    push(hub, run)
    add_results(run, stages=2)

    def meanwhile() -> None:
        hub.put(REPO, {"results.json": b"{}"})

    hub.fail("POST", "/commit/", 503, headers={"Retry-After": "0"}, before=meanwhile)
    with pytest.raises(HubError, match="changed at the same time; give the command again"):
        push(hub, run)
    assert hub.file(REPO, "results.json") == b"{}"


@pytest.mark.parametrize(
    ("who", "message"),
    [
        ("nobody", "the Hub does not accept the token"),
        ("reader", "the token may not do this"),
        ("stranger", "the token may not do this"),
    ],
)
def test_who_may_not_push_is_told_so_without_the_token(
    hub: LocalHub, finished: Path, who: str, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    hub.token("me")
    tokens = {"nobody": "hf_unknown", "reader": hub.token("me", "read"), "stranger": hub.token("other")}
    caplog.set_level("DEBUG")
    with pytest.raises(HubError, match=message) as raised:
        push(hub, finished, token=tokens[who])
    said = "".join(str(error) for error in (raised.value, raised.value.__cause__, raised.value.__context__))
    assert tokens[who] not in said + caplog.text
    with pytest.raises(HubError):
        check_access(REPO, finished, private=None, token=tokens[who])


def test_a_hub_without_xet_is_named_at_once(hub: LocalHub, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("hf_xet")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    with pytest.raises(HubError, match=r"takes no uploads by Xet \(404\).*`export HF_HUB_DISABLE_XET=1`"):
        push(hub, finished)
    assert not waited


@pytest.mark.parametrize(
    ("said", "message", "pauses"),
    [
        ("HTTP status client error (403 Forbidden)", "the token may not do this", 0),
        ("HTTP status client error (429 Too Many Requests)", "no more requests for now", RETRIES),
        ("HTTP status server error (502 Bad Gateway)", r"the Hub fails \(502\)", RETRIES),
        ("connection reset by peer", "the connection to the Hub broke", RETRIES),
    ],
)
def test_what_xet_says_in_words_counts(said: str, message: str, pauses: int, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)

    def fail() -> None:
        raise ConnectionError(f"Network error: Request error: {said}, domain: http://127.0.0.1:443/xet-write-token")

    with pytest.raises(HubError, match=message), explained(REPO):
        retried(fail)
    assert len(waited) == pauses


def test_nothing_to_publish(tmp_path: Path, run: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no run at"):
        check_run(tmp_path / "absent")
    add_results(run, stages=1, report=False)
    with pytest.raises(FileNotFoundError, match="no adapter that was measured yet"):
        check_run(run)
    add_results(run, report=False)
    results = json.loads((run / "results.json").read_text())
    (run / "results.json").write_text(json.dumps({**results, "method": "merge"}))
    with pytest.raises(ValueError, match="merged into one, which it has not kept; give the recipe's command again"):
        check_run(run)
    shutil.copytree(run / "adapters", run / "merged")
    assert {adapter.folder.parent.name for adapter in check_run(run)} == {"merged"}
    shutil.rmtree(run / "merged")
    (run / "results.json").write_text(json.dumps(results))
    weights = next(run.glob("adapters/stage_01*/adapter_model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0\0")
    with pytest.raises(AdapterError, match="damaged"):
        check_run(run)


# --- load ---


def test_without_its_base_nothing_is_published(hub: LocalHub, run: Path) -> None:
    shutil.rmtree(run / "base")
    with pytest.raises(FileNotFoundError, match=r"the base of .* is not at .*; put it back, then push"):
        push(hub, run)
    assert not hub.asked("POST", "create")


@pytest.mark.parametrize("name", ["action_head--50_checkpoint.pt", None])
def test_a_base_that_nobody_could_load_is_not_published(run: Path, name: str | None) -> None:
    """Weights that are no safetensors are not published, and would not be loaded."""
    if name is None:
        (run / "base" / "model.safetensors").rename(run / "base" / "pytorch_model.bin")
    else:
        (run / "base" / name).write_bytes(b"")
    with pytest.raises(
        ValueError, match=rf"has {'weights in ' + name if name else 'no .*safetensors'}, .*Train on one in safetensors"
    ):
        check_run(run)


def test_an_adapter_names_the_commit_of_a_base_on_the_hub(hub: LocalHub, finished: Path) -> None:
    """The base's main branch may go on; what is loaded is what was trained on."""
    push(hub, finished, base_repo="me/base")
    first = hub.repositories["me/base"].branches["main"]
    model, _ = load_openvla("me/base", token=hub.token("me"))
    assert model.config._commit_hash == first
    assert "_commit_hash" not in model.config.to_dict()
    config = json.loads(hub.file("me/base", "config.json"))
    hub.put("me/base", {"config.json": json.dumps({**config, "n_action_bins": 128}).encode()})
    assert load_openvla("me/base", token=hub.token("me"))[0].config._commit_hash != first
    old, _ = load_openvla("me/base", revision=first, token=hub.token("me"))
    assert (old.config._commit_hash, old.config.n_action_bins) == (first, config["n_action_bins"])
    assert load_openvla(finished / "base")[0].config._commit_hash is None


def test_a_base_that_was_not_trained_here_is_called_a_copy(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "elsewhere" / "run")
    shutil.move(run / "base", tmp_path / "base")
    for adapter in find_adapters(run):
        base = relative_base(tmp_path / "base", adapter.folder)
        training = {**adapter.info.training, "base_model": str(tmp_path / "base")}
        write_info(adapter.folder, replace(adapter.info, base_model=base, training=training))
    (tmp_path / "work").mkdir()
    published = prepare(run, REPO, tmp_path / "work")
    card = published.files["README.md"].read_text(encoding="utf-8")
    assert "`base/` is a copy of it, under the licence that it came with" in card
    assert "was trained with the run" not in card
    assert "base/config.json" in published.files


def test_a_base_is_found_through_a_link(finished: Path, tmp_path: Path) -> None:
    """Of `runs -> /scratch/deep/runs`, going up from an adapter leads to where the link points."""
    real = tmp_path / "scratch" / "deep"
    real.mkdir(parents=True)
    (tmp_path / "runs").symlink_to(real)
    shutil.copytree(finished, tmp_path / "runs" / "run")
    shutil.copytree(finished / "base", tmp_path / "base")
    folder = find_adapters(tmp_path / "runs" / "run")[0].folder
    assert (folder / relative_base(tmp_path / "base", folder)).resolve() == tmp_path / "base"


def test_list_says_what_is_inside_without_weights(hub: LocalHub, finished: Path) -> None:
    push(hub, finished)
    first, second = list_adapters(REPO)
    assert (first.folder, first.stage, first.tasks, first.seen) == ("stage_01", 1, [TASKS[1]], TASKS[:2])
    assert (first.success, second.success) == ({TASKS[1]: (6, 10)}, {TASKS[2]: (3, 10)})
    assert not hub.asked("GET", r"/cdn/|safetensors")
    assert [one.info.base_fingerprint for one in list_adapters(finished)] == [first.info.base_fingerprint] * 2


def test_one_adapter_is_downloaded_and_found_again_offline(
    hub: LocalHub, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(hub, finished)
    policy = load_policy(REPO, task="turn on the stove")
    with pytest.raises(ValueError, match=f"^{REPO} has learned no task 'juggle'"):  # not the folder of the cache
        policy.use("juggle")
    with pytest.raises(ValueError, match=f"^{REPO} has no adapter of stage 7"):
        load_policy(REPO, stage=7)
    assert act(policy, None) == act(load_policy(finished, stage=1), "turn on the stove")
    assert hub.asked("GET", r"/cdn/") == 2  # the base and one adapter; no figure, no video, no other stage
    assert not any(token for _, path, token in hub.requests if path.startswith("/cdn/"))
    asked = len(hub.requests)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert act(load_policy(REPO, stage=1)) == act(policy)
    assert [adapter.stage for adapter in list_adapters(REPO)] == [1, 2]
    with pytest.raises(FileNotFoundError, match=r"not all .* in the cache \(stage_02/.* once with a network"):
        load_policy(REPO, stage=2)
    with pytest.raises(FileNotFoundError, match="is not in the cache"):
        load_policy("me/never-seen")
    assert len(hub.requests) == asked


def test_a_cache_of_one_s_own_is_read_without_asking_anybody(hub: LocalHub, finished: Path, tmp_path: Path) -> None:
    push(hub, finished)
    mine = tmp_path / "mine"
    expected = act(load_policy(REPO, cache_dir=mine))
    assert list(mine.glob("models--*/snapshots/*/stage_02/adapter_model.safetensors"))
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").glob("models--*"))
    asked = len(hub.requests)
    assert act(load_policy(REPO, cache_dir=mine, local_files_only=True)) == expected
    assert len(list_adapters(REPO, cache_dir=mine, local_files_only=True)) == 2
    with pytest.raises(FileNotFoundError, match=r"not in the cache.* nor local_files_only is set"):
        load_policy(REPO, local_files_only=True)
    assert len(hub.requests) == asked


def test_without_a_connection_the_cache_is_looked_at_before_the_hub_is_asked_again(
    hub: LocalHub, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(hub, finished)
    expected = act(load_policy(REPO))
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert act(load_policy(REPO)) == expected
    assert [adapter.stage for adapter in list_adapters(REPO)] == [1, 2]
    assert not waited
    with pytest.raises(FileNotFoundError, match="is not in the cache, and the Hub cannot be reached"):
        list_adapters("me/never-seen")
    assert len(waited) == RETRIES
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    hub.fail("GET", "/api/models/", 503, times=2)
    waited.clear()
    list_adapters(REPO)  # an answer with a status: the Hub is there, and what it has now is wanted
    assert len(waited) == 2


def test_a_download_that_breaks_is_taken_up_again(hub: LocalHub, finished: Path) -> None:
    push(hub, finished)
    hub.cut("GET", "/cdn/", times=1)
    hub.fail("GET", "/cdn/", 429, times=1, headers={"Retry-After": "0"})
    hub.fail("GET", "/api/models/", 503, times=2)
    assert act(load_policy(REPO)) == act(load_policy(finished))


def test_a_revision_is_what_it_was(hub: LocalHub, run: Path) -> None:
    add_results(run, stages=2)
    old = push(hub, run).commit
    add_results(run)
    push(hub, run)
    assert [adapter.stage for adapter in list_adapters(REPO, revision=old)] == [1]
    assert act(load_policy(REPO, revision=old)) == act(load_policy(run, stage=1))
    with pytest.raises(FileNotFoundError, match="no such revision"):
        load_policy(REPO, revision="absent")
    with pytest.raises(ValueError, match="which has no revisions"):
        load_policy(run, revision="main")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adapter_model.safetensors": b"\0" * 900}, r"adapter_model\.safetensors is damaged"),
        ({"stage_01/adapter_model.bin": b"\x80\x04."}, "can run code when it is read"),
        ({"../infovla.json": b"{}"}, "names a file outside itself"),
        ({"infovla.json": {"format_version": 99}}, "update the package"),
        ({"infovla.json": {"base_model": "../../../../secrets"}}, "base lies outside itself"),
        ({"infovla.json": {"base_fingerprint": {"config": "0", "weights": "0"}}}, "another base than"),
        ({"infovla.json": {"task": "changed"}, "seal": False}, "does not match its checksum"),
    ],
)
def test_what_must_not_be_loaded_is_refused(
    hub: LocalHub, finished: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    push(hub, finished)
    if isinstance(wanted := change.get("infovla.json"), dict):
        content = {**json.loads(hub.file(REPO, "infovla.json")), **wanted}
        if "format_version" not in wanted and change.pop("seal", True):
            for name in ("adapter_model.safetensors", "adapter_config.json", "dataset_statistics.json"):
                (tmp_path / name).write_bytes(hub.file(REPO, name))
            (tmp_path / "infovla.json").write_bytes(hub.file(REPO, "infovla.json"))
            info = read_info(tmp_path)
            write_info(tmp_path, type(info)(**{**vars(info), **wanted}))
            content = json.loads((tmp_path / "infovla.json").read_text())
        change = {"infovla.json": json.dumps(content).encode()}
    hub.put(REPO, change, remove=[path for path in hub.files(REPO) if path.startswith("stage_02/")])
    with pytest.raises(AdapterError, match=message):
        load_policy(REPO)


@pytest.mark.parametrize("where", ["copy", "hub"])
def test_the_root_is_checked_though_its_stage_is_there_twice(
    hub: LocalHub, finished: Path, tmp_path: Path, where: str
) -> None:
    """It is what PEFT reads, and what somebody would change."""
    push(hub, finished)
    original = {name: hub.file(REPO, name) for name in ("adapter_model.safetensors", "infovla.json")}
    copy = Path(snapshot_download(REPO, local_dir=tmp_path / "copy"))
    place = copy if where == "copy" else REPO

    def change(name: str, content: bytes | None) -> None:
        if where == "hub":
            hub.put(REPO, {} if content is None else {name: content}, remove=[name] if content is None else [])
        elif content is None:
            (copy / name).unlink()
        else:
            (copy / name).write_bytes(content)

    load_policy(place)
    change("adapter_model.safetensors", b"garbage")
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors is damaged"):
        load_policy(place)
    change("adapter_model.safetensors", None)
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors is missing"):
        load_policy(place)
    change("adapter_model.safetensors", original["adapter_model.safetensors"])
    load_policy(place)
    info = read_info(copy) if where == "copy" else read_info(find_adapters(finished)[-1].folder)
    for name in ("adapter_model.safetensors", "adapter_config.json", "dataset_statistics.json"):
        (tmp_path / name).write_bytes(hub.file(REPO, name))
    write_info(tmp_path, replace(info, base_fingerprint={**info.base_fingerprint, "weights": "0" * 64}))
    change("infovla.json", (tmp_path / "infovla.json").read_bytes())
    for ask in (load_policy, list_adapters):
        with pytest.raises(AdapterError, match=r"infovla\.json is of another adapter than stage_02/infovla\.json"):
            ask(place)


def test_a_copy_that_lost_the_description_of_a_stage_is_not_whole(
    hub: LocalHub, finished: Path, tmp_path: Path
) -> None:
    push(hub, finished)
    copy = Path(snapshot_download(REPO, local_dir=tmp_path / "copy"))
    (copy / "stage_01" / "infovla.json").unlink()
    for ask in (load_policy, list_adapters):
        with pytest.raises(AdapterError, match=r"stage_01/infovla\.json is missing: copy the whole"):
            ask(copy)


def test_no_branch_is_made_for_a_pull_request(hub: LocalHub, finished: Path) -> None:
    with pytest.raises((FileNotFoundError, HubError)):
        push(hub, finished, revision="refs/pr/1")
    assert "refs/pr/1" not in hub.repositories[REPO].branches


def test_a_copy_without_its_descriptions_is_no_plain_adapter(hub: LocalHub, finished: Path, tmp_path: Path) -> None:
    """It would be loaded for every task, whatever its weights, on whatever base."""
    push(hub, finished)
    copy = Path(snapshot_download(REPO, local_dir=tmp_path / "copy"))
    (copy / "infovla.json").unlink()
    for ask in (load_policy, list_adapters):
        with pytest.raises(AdapterError, match=r"infovla\.json is missing, while stage_0\d/ is there.*Copy the whole"):
            ask(copy)
    for stage in (1, 2):
        (copy / f"stage_0{stage}" / "infovla.json").unlink()
    with pytest.raises(AdapterError, match=r"infovla\.json is missing, while stage_0"):
        load_policy(copy, task="turn on the stove", base=finished / "base")
    for folder in ("stage_01", "stage_02"):
        with pytest.raises(
            AdapterError, match=r"infovla\.json is missing.*base at '\.\./base'.*Copy the whole folder"
        ):
            load_policy(copy / folder)
        shutil.rmtree(copy / folder)
    with pytest.raises(AdapterError, match=r"infovla\.json is missing.*base at '\./base'.*Copy the whole folder"):
        load_policy(copy)
    hub.put(REPO, {}, remove=["infovla.json"])
    with pytest.raises(AdapterError, match=r"infovla\.json is missing, while stage_0\d/ is there"):
        load_policy(REPO)


def test_a_base_that_goes_along_is_checked_file_by_file(hub: LocalHub, finished: Path, tmp_path: Path) -> None:
    push(hub, finished)
    expected = act(load_policy(finished))
    weights = bytearray(hub.file(REPO, "base/model.safetensors"))
    weights[-5] ^= 1
    changes = {
        "model.safetensors": bytes(weights),
        "tokenizer.json": hub.file(REPO, "base/tokenizer.json") + b" ",
        "preprocessor_config.json": hub.file(REPO, "base/preprocessor_config.json") + b" ",
        "added_tokens.json": b"{}",
        "infovla_base.json": hub.file(REPO, "base/infovla_base.json").replace(b"tokenizer.json", b"tokenizer_.json"),
    }
    for name, content in changes.items():
        copy = Path(snapshot_download(REPO, local_dir=tmp_path / name))
        assert act(load_policy(copy)) == expected
        (copy / "base" / name).write_bytes(content)
        for where, options in ((copy, {}), (copy, {"stage": 0}), (copy / "base", {}), (copy / "stage_01", {})):
            with pytest.raises(AdapterError, match=rf"base/{re.escape(name)} .*download the whole folder again"):
                load_policy(where, **options)
    hub.put(REPO, {"base/tokenizer.json": changes["tokenizer.json"]})
    with pytest.raises(AdapterError, match=r"base/tokenizer\.json is damaged"):
        load_policy(REPO)
    hub.put(REPO, {}, remove=["base/infovla_base.json"])  # as an earlier version pushed it
    assert act(load_policy(REPO)) == expected


def test_a_pickle_in_a_local_adapter_is_refused(run: Path) -> None:
    adapter = next(run.glob("adapters/stage_01*"))
    (adapter / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(AdapterError, match="can run code when it is read"):
        load_policy(adapter)


def test_a_checkpoint_here_is_a_policy_although_its_trainer_left_its_state(run: Path) -> None:
    """`load_best_model_at_end` is refused with the advice to evaluate the checkpoints that were kept."""
    adapter = next(run.glob("adapters/stage_01*"))
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_1.pth", "training_args.bin"):
        (adapter / name).write_bytes(b"no pickle: reading it would be an error")
    load_policy(adapter)
    (adapter / "optimizer.pt").rename(adapter / "weights.pt")
    with pytest.raises(AdapterError, match=r"holds weights\.pt, which can run code"):
        load_policy(adapter)


def test_a_pickle_below_a_local_copy_is_refused_but_not_the_trainers_own(run: Path, hub: LocalHub) -> None:
    trained = run / "stages" / "stage_01" / "checkpoint-2" / "optimizer.pt"
    trained.parent.mkdir(parents=True)
    trained.write_bytes(b"x")
    load_policy(run)
    push(hub, run)
    copy = Path(snapshot_download(REPO, local_dir=run.parent / "copy"))
    load_policy(copy)
    (copy / "stage_01" / "extra").mkdir()
    (copy / "stage_01" / "extra" / "weights.pkl").write_bytes(b"\x80\x04.")
    for ask in (load_policy, list_adapters):
        with pytest.raises(AdapterError, match=r"holds stage_01/extra/weights\.pkl, which can run code"):
            ask(copy)
    (run / "base" / "model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(AdapterError, match=r"holds base/model\.bin"):
        load_policy(run)


# --- the card ---


def test_the_card_says_what_was_measured_and_what_was_not(hub: LocalHub, finished: Path) -> None:
    push(hub, finished)
    text = hub.file(REPO, "README.md").decode()
    card = ModelCard(text)
    data = card.data
    assert (data.library_name, data.pipeline_tag, data.license) == ("peft", "robotics", "apache-2.0")
    assert (data.base_model, data.base_model_relation, data.datasets) == (REPO, "adapter", ["HuggingFaceVLA/libero"])
    assert {entry.dataset_type for entry in data.eval_results} == {"HuggingFaceVLA/libero"}
    assert {"infovla", "lora", "libero_10", "continual-learning"} <= set(data.tags)
    listed = {entry.metric_name: entry.metric_value for entry in data.eval_results}
    assert listed == {"turn on the stove": 60.0, "close the door": 30.0}  # the mean needs all three
    row = next(line for line in text.splitlines() if line.startswith("| open the drawer |"))
    assert row.split(" | ")[1].startswith("**9/10 (90%, 60% to 98%)**")
    assert "not measured" in row
    assert "| final average | not measured |" in text
    assert "asset set `primitive`" in text
    assert "10 rollouts per task and stage" in text
    assert "{{" not in text
    assert "{%" not in text
    assert "undefined" not in text
    assert "(figures/success_matrix.png)" in text
    shown = {link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")}
    assert shown <= set(hub.files(REPO))


@pytest.mark.parametrize(
    ("source", "datasets", "words"),
    [
        (None, [], "Trained on demonstrations that a script recorded in the scenes of this suite"),
        (
            "user/robot",
            ["user/robot"],
            "Trained on demonstrations of the data set [user/robot](https://huggingface.co/",
        ),
        ("hf://datasets/user/robot", ["user/robot"], "Trained on demonstrations of the data set [user/robot]"),
        ("/data/my/robot", [], "Trained on demonstrations that are not published with it"),
        ("here/robot", [], "Trained on demonstrations that are not published with it"),
    ],
)
def test_the_card_names_the_demonstrations_that_were_learned_from(
    run: Path, source: str | None, datasets: list[str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run)
    (run / "here" / "robot").mkdir(parents=True)
    results = add_results(run, report=False)
    results.config["demonstrations_source"] = source
    results.save(run / "results.json")
    (run / "workspace").mkdir()
    text = prepare(run, REPO, run / "workspace").files["README.md"].read_text()
    assert ModelCard(text).data.datasets == [*datasets, LIBERO]
    assert words in text
    assert "/data/my" not in text


def test_a_folder_of_data_is_no_data_set_of_the_hub(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a relative name with one slash it looks like one, from any other working directory."""
    results = add_results(run, report=False)
    results.config["demonstrations_source"] = "data/kitchen"
    results.save(run / "results.json")
    RunFolder(run).mark("demonstrations", 1.0, folder=True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "workspace").mkdir()
    text = prepare(run, REPO, tmp_path / "workspace").files["README.md"].read_text()
    assert ModelCard(text).data.datasets == [LIBERO]
    assert "data/kitchen" not in text


def test_the_card_counts_what_is_learned_so_far(run: Path, hub: LocalHub) -> None:
    """It is pushed after every stage."""
    results = add_results(run, stages=2)
    planned = max(task.learned_at for task in results.tasks)
    push(hub, run)
    text = " ".join(hub.file(REPO, "README.md").decode().split())
    learned = sum(task.learned_at < results.stages for task in results.tasks)
    assert learned < len(results.tasks)
    assert f"that learned {learned} robot tasks of" in text
    assert f"{results.stages - 1} of its {planned} stages so far)" in text


def test_the_card_says_that_base_and_teacher_were_quantised(finished: Path) -> None:
    info, results = read_info(find_adapters(finished)[-1].folder), Results.load(finished / "results.json")
    assert "4 bits" not in card(results, info, REPO, files=[], stages=[info])
    text = card(results, replace(info, quantization="nf4"), REPO, files=[], stages=[info])
    assert "held in 4 bits (`nf4`) in training, and so was the teacher, which is this same quantised base" in text


def test_eval_results_are_in_the_hubs_format(hub: LocalHub, run: Path) -> None:
    add_results(run, stages=2)
    push(hub, run)
    assert ".eval_results/libero.yaml" not in hub.files(REPO)  # of stand-in assets nothing stands on a leaderboard
    assert b"without an entry for leaderboards" in hub.file(REPO, "README.md")
    results = add_results(run, stages=2, assets="official")
    push(hub, run)
    (entry,) = parse_eval_result_entries(yaml.safe_load(hub.file(REPO, ".eval_results/libero.yaml")))
    assert (entry.dataset_id, entry.task_id) == ("HuggingFaceVLA/libero", "libero_10")
    assert entry.value == round(100 * results.metrics()["final_average"], 2)
    card = hub.file(REPO, "README.md").decode()
    assert "without an entry for leaderboards" not in card
    assert entry.value == ModelCard(card).data.eval_results[0].metric_value
    assert "official" in entry.notes


def test_the_card_template_is_found_and_goes_into_the_wheel() -> None:
    assert template_path("adapters.md").is_file()
    with pytest.raises(FileNotFoundError, match="install infovla-peft again"):
        template_path("absent.md")
    project = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    assert '"hub_cards" = "infovla_peft/hub_cards"' in project


ELSEWHERE = """
import json, sys, warnings
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
sys.path.insert(0, {tests!r})
import torch
from tiny_run import act
from infovla_peft import load_policy
from infovla_peft.models.openvla import load_openvla
from peft import PeftModel
from huggingface_hub import snapshot_download

found = {{"all": act(load_policy({repo!r})), "task": act(load_policy({repo!r}, task="turn on the stove"), None)}}
namespace = {{}}
exec({snippet!r}, namespace)
found["snippet"] = list(namespace["actions"].shape)
base, _ = load_openvla(snapshot_download({repo!r}, allow_patterns="base/*") + "/base")
alone = PeftModel.from_pretrained(base, {repo!r}).eval()
with torch.no_grad():
    inputs = torch.load({inputs!r}, weights_only=True)
    found["peft"] = torch.equal(alone(**inputs).predicted_actions, torch.load({expected!r}, weights_only=True))
print(json.dumps(found))
"""


def test_another_process_with_an_empty_cache_acts_bit_for_bit_the_same(
    hub: LocalHub, finished: Path, tmp_path: Path
) -> None:
    push(hub, finished)
    policy = load_policy(finished)
    inputs = {
        "input_ids": torch.tensor([[1, 4, 5, 6]]),
        "attention_mask": torch.ones(1, 4, dtype=torch.long),
        "pixel_values": torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(0)),
        "proprio": torch.linspace(-1, 1, 8)[None],
    }
    with torch.no_grad():
        torch.save(policy.model(**inputs).predicted_actions, tmp_path / "expected.pt")
    torch.save(inputs, tmp_path / "inputs.pt")
    card = hub.file(REPO, "README.md").decode()
    snippet = card.split("```python\n")[1].split("\n```")[0]
    assert "load_policy" in snippet
    code = ELSEWHERE.format(
        tests=str(Path(__file__).parent),
        repo=REPO,
        snippet=snippet,
        inputs=str(tmp_path / "inputs.pt"),
        expected=str(tmp_path / "expected.pt"),
    )
    environment = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": str(Path(__file__).parent.parent),
        "PATH": "/usr/bin:/bin",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["all"] == act(policy)
    assert found["task"] == act(load_policy(finished, task="turn on the stove"), None)
    assert found["snippet"] == [2, 7]
    assert found["peft"] is True


# --- collections and the command line ---


def test_a_collection_gathers_a_benchmark(hub: LocalHub, finished: Path) -> None:
    token = hub.token("me")
    push(hub, finished)
    address = create_collection("LIBERO", {REPO: "infovla, seed 0"}, description="one run", token=token)
    (slug,) = hub.collections
    assert address == f"{hub.url}/collections/{slug}"
    assert create_collection("LIBERO", [REPO], token=token) == address  # again: nothing twice
    assert create_collection("LIBERO", REPO, token=token) == address
    (item,) = hub.collections[slug]["items"]
    assert (item["id"], item["note"]["text"]) == (REPO, "infovla, seed 0")
    with pytest.raises(FileNotFoundError, match="me/absent"):
        create_collection("LIBERO", ["me/absent"], token=token)
    with pytest.raises(ValueError, match="150 characters"):
        create_collection("LIBERO", [REPO], description="x" * 151, token=token)
    with pytest.raises(ValueError, match="at least one"):
        create_collection("LIBERO", [], token=token)


def test_push_and_list_on_the_command_line(
    hub: LocalHub, finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", hub.token("me"))
    assert main(["push", str(finished), "--repo", REPO, "--dry-run"]) == 0
    planned = capsys.readouterr().out
    assert "stage_02/adapter_model.safetensors" in planned
    assert "one commit: infovla on libero_10, B1-2N1: stages 1 to 2 of 2" in planned
    assert planned.startswith(f"to {REPO}, branch main:")
    dry = ["push", str(finished), "--dry-run", "--private", "--revision", "v2", "--base_repo", "me/base"]
    assert main([*dry, "--repo", REPO]) == 0
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"to me/base: the base, [\d,]+ bytes in 7 files, one commit", first)
    assert second == f"to {REPO}, branch v2, private:"
    for repo, message in (("a/b/c", "'a/b/c' is no Hub id user/name"), ("me/base", "cannot hold the adapters and")):
        assert main([*dry, "--repo", repo]) == 1
        printed = capsys.readouterr()
        assert message in printed.err
        assert not printed.out
    assert not hub.requests
    assert main(["push", str(finished), "--repo", REPO, "--private", "--commit_message", "first"]) == 0
    assert "commit" in capsys.readouterr().out
    assert hub.repositories[REPO].private
    assert main(["list", REPO]) == 0
    assert f"{TASKS[1]}: 6 of 10" in capsys.readouterr().out
    assert main(["list", REPO, "--json"]) == 0
    assert [one["stage"] for one in json.loads(capsys.readouterr().out)] == [1, 2]
    assert main(["list", "me/absent"]) == 1
    assert "the Hub has no repository me/absent" in capsys.readouterr().err
    assert main(["push", str(finished / "base"), "--repo", REPO]) == 1
    assert "give the folder of a run" in capsys.readouterr().err


def test_commands_take_a_token(hub: LocalHub, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    token = ("--token", hub.token("me"))
    assert main(["push", str(finished), "--repo", REPO, "--private", *token]) == 0
    image = next(iter((finished / "report").glob("*.png")))
    what = ("--images", str(image), "--instruction", "open the drawer", "--proprio", *["0.1"] * 8)
    for command, options in (("list", ()), ("evaluate", ("--dry-run", "--tasks", "0")), ("act", what)):
        if command == "evaluate" and not libero_installed():
            continue
        assert main([command, REPO, *options, *token]) == 0
        assert main([command, REPO, *options]) == 1
        assert "or you have no access to it" in capsys.readouterr().err

"""The report is written whole, shows what results.json holds and nothing else, and escapes what comes from data."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from infovla_peft.figures import cell_colours
from infovla_peft.metrics import average_by_stage
from infovla_peft.report import read_loss_curves, write_report, write_report_apart
from infovla_peft.results import Results, ResultsError, TaskEntry, Video

FIGURES = {"success_matrix.png", "success_by_stage.png", "success_by_stage_narrow.png"}
CURVES = {"loss_terms.png", "loss_terms_narrow.png"}


def write_run(folder: Path, *, stages: int = 3, instruction: str = "turn on the stove", logs: bool = True) -> Results:
    results = Results(
        method="infovla",
        stream="B2-2N1",
        suite="libero_goal",
        seed=3,
        base_model="tiny",
        teacher="base",
        assets="primitive",
        renderer="fast",
        step_cap=297,
        open_loop_steps=8,
        tasks=[
            TaskEntry("a", "open the drawer", 0),
            TaskEntry("b", "push the plate", 0),
            TaskEntry("c", instruction, 1),
            TaskEntry("d", "put the bowl on top of the cabinet", 2),
        ],
        versions={"mujoco": "3.3.2"},
        config={"lambda_rac": 0.1, "note": instruction},
    )
    counts = [{"a": (18, 20), "b": (13, 20)}, {"a": (7, 20), "c": (20, 20)}, dict.fromkeys("abcd", (11, 20))]
    for stage, cells in enumerate(counts[:stages]):
        path = f"videos/stage_{stage:02d}/a #1?_failure.mp4"
        (folder / path).parent.mkdir(parents=True)
        (folder / path).write_bytes(b"")
        videos = [Video(path, "a", stage, False), Video("videos/missing.mp4", "b", stage, True)]
        results.add_stage(stage, cells, timings={"train": 3725.2, "evaluate": 61}, videos=videos)
        if logs:
            log = folder / "stages" / f"stage_{stage:02d}" / "log.jsonl"
            log.parent.mkdir(parents=True)
            entries = [{"step": step, "policy_loss": 1 / step} for step in range(10, 200, 10)]
            if stage:
                entries = [{**entry, "rac": 0.0, "cmi": -0.5} for entry in entries]
            log.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    results.save(folder / "results.json")
    return results


class Page(HTMLParser):
    """Text, links and tags of a page; fails on tags that are not closed in order."""

    VOID = ("meta", "img", "br", "source", "link")

    def __init__(self, source: str) -> None:
        super().__init__()
        self.text: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.stack: list[str] = []
        self.feed(source)
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for key, value in attrs if key in ("href", "src", "srcset")]
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.stack[-1:] != ["style"]:
            self.text.append(data)


def test_writes_page_and_figures(tmp_path: Path) -> None:
    write_run(tmp_path)
    page = write_report(tmp_path)
    assert page == tmp_path / "report" / "index.html"
    assert {file.name for file in page.parent.iterdir()} == {"index.html", *FIGURES, *CURVES}
    for name in FIGURES | CURVES:
        with Image.open(page.parent / name) as picture:
            assert min(picture.size) > 300
    parsed = Page(page.read_text())
    for link in parsed.links:
        assert not re.match(r"\w+:|//|/", link)
    local = [page.parent / unquote(link) for link in parsed.links]
    assert all(path.is_file() for path in local)
    assert "script" not in parsed.tags
    assert parsed.tags.count("video") == 3


def test_every_number_follows_from_the_results(tmp_path: Path) -> None:
    results = write_run(tmp_path)
    text = " ".join(Page(write_report(tmp_path).read_text()).text)
    metrics = results.metrics()
    for name, value in metrics.items():
        assert f"{100 * value:.1f}".replace("-", "−") in text, name
    averages = average_by_stage(results.success, results.learned_at)
    rates = np.concatenate([cells.ravel() for cells in (results.success, *results.intervals(), averages)])
    expected = {f"{100 * rate:.0f}" for rate in rates if not np.isnan(rate)}
    expected |= {f"{abs(100 * value):.1f}" for value in metrics.values()}
    expected |= {"7", "11", "13", "18", "20"}  # successes, episodes
    expected |= {"3", "4", "0", "1", "2"}  # stages or seed, tasks, names of stages and formulae
    expected |= {"297", "8", "3.3.2", "0.1", "1:02:05", "1:01"}  # step cap, chunk, version, configuration, times
    expected |= {"95"}  # per cent of the interval
    assert set(re.findall(r"(?<![\w.])\d[\d.:]*(?<![.:])(?!\w)", text)) <= expected


@pytest.mark.parametrize("stages", [1, 2])
def test_unfinished_run(tmp_path: Path, stages: int) -> None:
    write_run(tmp_path, stages=stages, logs=False)
    page = write_report(tmp_path)
    assert {file.name for file in page.parent.iterdir()} == {"index.html", *FIGURES}
    text = " ".join(Page(page.read_text()).text)
    assert f"unfinished: stage {stages} of 3" in text
    assert "Loss terms" not in text
    assert f"{stages} recorded videos are not in this folder" in text


def test_data_is_escaped_and_never_typeset(tmp_path: Path) -> None:
    nasty = "<script>alert('1')</script> & \"quote\" $\\frac{1$ {{ 7 * 7 }}"
    write_run(tmp_path, instruction=nasty)
    source = write_report(tmp_path).read_text()
    assert "<script" not in source
    page = Page(source)
    assert "script" not in page.tags
    assert nasty in page.text
    assert "49" not in " ".join(page.text)


def test_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path)
    page = write_report(tmp_path)
    before = page.read_bytes()
    (page.parent / "left_over.png").write_bytes(b"")

    def fail(*_: object, **__: object) -> str:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("infovla_peft.report.render_page", fail)
        with pytest.raises(OSError, match="No space left"):
            write_report(tmp_path)
    assert page.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []
    write_report(tmp_path)
    assert not (page.parent / "left_over.png").exists()
    assert page.read_bytes() == before


def test_damaged_or_empty_results_leave_the_report_alone(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="folder of a run"):
        write_report(tmp_path)
    write_run(tmp_path, stages=0)
    with pytest.raises(ValueError, match="no evaluated stage yet"):
        write_report(tmp_path)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(ResultsError):
        write_report(tmp_path)
    assert not (tmp_path / "report").exists()


def test_a_process_of_its_own_writes_the_same(tmp_path: Path) -> None:
    write_run(tmp_path)

    def written() -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in (tmp_path / "report").iterdir()}

    assert write_report_apart(tmp_path) == tmp_path / "report" / "index.html"
    apart = written()
    write_report(tmp_path)
    assert apart == written()
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(ResultsError):
        write_report_apart(tmp_path)
    assert apart == written()


@pytest.mark.parametrize("pictures", range(len(FIGURES | CURVES) + 1))
def test_a_report_that_nobody_waits_for_is_not_written(tmp_path: Path, pictures: int) -> None:
    write_run(tmp_path, stages=1)
    older = write_report(tmp_path).read_bytes()
    (tmp_path / "results.json").unlink()
    write_run(tmp_path / "more")
    (tmp_path / "more" / "results.json").rename(tmp_path / "results.json")
    left = iter(range(pictures))

    def alive() -> None:
        if next(left, None) is None:
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        write_report(tmp_path, alive=alive)
    assert (tmp_path / "report" / "index.html").read_bytes() == older
    assert not list(tmp_path.glob(".*report*"))


def test_logs_of_a_killed_and_resumed_run(tmp_path: Path) -> None:
    log = tmp_path / "stages" / "stage_01" / "log.jsonl"
    log.parent.mkdir(parents=True)
    lines = [
        '{"step": 20, "policy_loss": 5.0, "rac": NaN}',
        '{"step": 10, "policy_loss": 1.0, "rac": 2.0}',
        '{"step": 20, "policy_lo{"step": 20, "policy_loss": 0.5}',
        '{"step": 20, "policy_loss": 0.5, "lr": 1e-4}',
        '{"policy_loss": 0.5}',
        '{"step": null}',
        '"text"',
        "[]",
        "",
        '{"step": 30, "policy_loss": Infinity}',
    ]
    log.write_text("\n".join(lines))
    curves, unreadable = read_loss_curves(tmp_path)
    assert unreadable == 5
    assert [(curve.stage, curve.term) for curve in curves] == [(1, "policy_loss"), (1, "rac")]
    assert curves[0].steps.tolist() == [10, 20]
    assert curves[0].values.tolist() == [1.0, 0.5]
    write_run(tmp_path / "run", logs=False)
    (tmp_path / "stages").rename(tmp_path / "run" / "stages")
    assert "5 unreadable log lines" in write_report(tmp_path / "run").read_text()


def test_cells_can_be_read() -> None:
    """WCAG contrast of the text in every cell; 4.5 is its norm for small print."""

    def luminance(colour: str) -> float:
        red, green, blue = (c / 12.92 if c <= 0.04 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour))
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    for rate in np.linspace(0, 1, 101):
        dark, light = sorted(luminance(colour) for colour in cell_colours(rate))
        assert (light + 0.05) / (dark + 0.05) > 4.39, rate

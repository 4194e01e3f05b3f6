"""What an analysis says: its numbers on known cases, a whole run over fakes, the figures, and a damaged file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from stream_fakes import STREAM, TRAINING, install_fakes
from test_report import Page, write_run
from tiny_policy import TinyPolicy, tiny_policy
from torch.nn import functional as F

from infovla_peft import analysis_figures
from infovla_peft.analysis import AFFINITY_TEMPERATURE, analyse_run, compare_analyses, is_analysed
from infovla_peft.analysis_results import AffinityPair, Analysis, AnalysisError, ProbedTask, SimilarityPair, compare
from infovla_peft.cli import main
from infovla_peft.config import InfoVLAConfig, StreamConfig
from infovla_peft.features import Features, FeatureTap, extract_features
from infovla_peft.inference import Policy
from infovla_peft.memory import ReplayMemory
from infovla_peft.models.openvla import build_prompt
from infovla_peft.probe import Probe, choose_episodes, instruction_words, look_at, spread_rows
from infovla_peft.report import write_report
from infovla_peft.representation import affinity_maps, diffusion, linear_cka, similarity_matrix, swap_change
from infovla_peft.results import Results, TaskEntry
from infovla_peft.run_folder import RunError
from infovla_peft.stream import Stream

FIGURES = {"affinity.png", "similarity.png"} | {
    f"{name}{narrow}.png"
    for name in ("diffusion", "cka", "listening", "swap_change", "action_error")
    for narrow in ("", "_narrow")
}


def features(vision: torch.Tensor, language: torch.Tensor, mask: torch.Tensor | None = None) -> Features:
    mask = torch.ones(language.shape[:2], dtype=torch.bool) if mask is None else mask
    return Features(vision.mean(1), vision, language * mask[..., None], mask)


# --- affinity and diffusion


def test_an_affinity_map_equals_a_loop_over_words() -> None:
    torch.manual_seed(0)
    vision, language = torch.randn(2, 5, 8), torch.randn(2, 4, 8)
    mask = torch.tensor([[True, True, True, True], [True, True, False, False]])
    words = torch.tensor([[False, True, True, False], [False, True, True, False]])
    maps = affinity_maps(features(vision, language, mask), words, temperature=0.3)
    for b, chosen in enumerate([[1, 2], [1]]):
        looks = [(F.cosine_similarity(vision[b], language[b, w], dim=-1) / 0.3).softmax(0) for w in chosen]
        torch.testing.assert_close(maps[b], torch.stack(looks).mean(0))
    torch.testing.assert_close(maps.sum(1), torch.ones(2))
    assert not affinity_maps(features(vision, language, mask), torch.zeros_like(words)).any()


def test_a_map_points_at_the_patch_that_is_named() -> None:
    vision = torch.eye(4)[None]
    maps = affinity_maps(features(vision, vision[:, 2:3]), temperature=0.01)
    assert maps[0].argmax() == 2
    assert diffusion(maps)[0] < 1e-6
    blind = affinity_maps(features(torch.ones(1, 4, 4), vision[:, 2:3]), temperature=0.01)
    torch.testing.assert_close(diffusion(blind), torch.ones(1))


def test_diffusion_of_known_maps() -> None:
    patches = 64
    uniform, one_hot, half = torch.full((patches,), 1 / patches), torch.eye(patches)[5], torch.zeros(patches)
    half[:8] = 1 / 8
    torch.testing.assert_close(diffusion(torch.stack((uniform, one_hot, half))), torch.tensor([1.0, 0.0, 0.5]))
    with pytest.raises(ValueError, match="at least two patches"):
        diffusion(torch.ones(3, 1))


# --- representations


@pytest.mark.parametrize("unbiased", [False, True])
def test_cka_is_blind_to_rotation_scale_and_shift_and_to_nothing_else(unbiased: bool) -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(40, 12, generator=random)
    rotation = torch.linalg.qr(torch.randn(12, 12, generator=random)).Q
    for y in (x, x @ rotation, 3.7 * x, x + 5.0, -x):
        assert float(linear_cka(x, y, unbiased=unbiased)) == pytest.approx(1.0, abs=1e-5)
    stretched = x * torch.linspace(0.01, 4.0, 12)
    assert float(linear_cka(x, stretched, unbiased=unbiased)) < 0.95
    assert float(linear_cka(x, torch.ones(40, 3), unbiased=unbiased)) == 0.0


def test_cka_by_hand() -> None:
    # Centred already: XᵀX = diag(2, 2), YᵀX = (2, 0), YᵀY = 2, so CKA = 4 / (sqrt(8) · 2).
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    y = torch.tensor([[1.0], [-1.0], [0.0], [0.0]])
    assert float(linear_cka(x, y)) == pytest.approx(0.5**0.5)
    with pytest.raises(ValueError, match="N ≥ 4"):
        linear_cka(x[:3], y[:3], unbiased=True)
    with pytest.raises(ValueError, match=r"\(N, D1\)"):
        linear_cka(x, y[:3])


def test_cka_of_independent_representations() -> None:
    random = torch.Generator().manual_seed(0)
    many = [torch.randn(4000, 8, generator=random) for _ in range(2)]
    assert float(linear_cka(*many)) < 0.01
    few = [torch.randn(32, 128, generator=random) for _ in range(2)]
    assert float(linear_cka(*few)) > 0.7  # the bias
    assert abs(float(linear_cka(*few, unbiased=True))) < 0.1


def test_the_unbiased_hsic_equals_its_definition() -> None:
    """Song et al. 2012: the mean over all ordered tuples of different samples, here by a loop."""
    from itertools import permutations

    random = torch.Generator().manual_seed(1)
    x, y = (torch.randn(6, 3, generator=random).double() for _ in range(2))

    def hsic(k: torch.Tensor, m: torch.Tensor) -> float:
        values = [
            k[a, b] * m[a, b] + k[a, b] * m[c, d] - 2 * k[a, b] * m[a, c] for a, b, c, d in permutations(range(6), 4)
        ]
        return float(torch.stack(values).mean())

    k, m = x @ x.T, y @ y.T
    expected = hsic(k, m) / (hsic(k, k) * hsic(m, m)) ** 0.5
    assert float(linear_cka(x, y, unbiased=True)) == pytest.approx(expected, abs=1e-9)


def test_similarities() -> None:
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    torch.testing.assert_close(similarity_matrix(x, x), torch.eye(2))
    shared = torch.tensor([100.0, 100.0])
    assert float(similarity_matrix(x + shared, x + shared)[0, 1]) > 0.99
    torch.testing.assert_close(similarity_matrix(x + shared, x + shared, centre=shared), torch.eye(2))


# --- listening


def test_the_change_of_actions_is_a_mean_per_instruction() -> None:
    own = torch.zeros(3, 2, 7)
    swapped = torch.stack((own, own + 0.5, torch.where(torch.arange(7) < 1, -0.7, 0.0).expand(3, 2, 7)))
    torch.testing.assert_close(swap_change(own, swapped), torch.tensor([0.0, 0.5, 0.1]))


def as_policy(tiny: TinyPolicy) -> Policy:
    return Policy(tiny.model, tiny.processor, tiny.collator.normaliser)


def probe_of(tiny: TinyPolicy, rows: range = range(6)) -> Probe:
    samples = tiny.dataset.__getitems__(list(rows))
    return Probe(TaskEntry("open_the_drawer", samples.instructions[0], 0), samples, [0])


@pytest.mark.parametrize("autoregressive", [False, True])
def test_a_policy_looked_at(autoregressive: bool) -> None:
    tiny = tiny_policy(autoregressive=autoregressive)
    probe = probe_of(tiny)
    others = ["turn on the stove", probe.task.instruction]
    found = look_at(as_policy(tiny), probe, others, batch_size=4)
    assert found.action.shape == (6, 32)
    assert found.maps.shape == (6, 4)
    torch.testing.assert_close(found.maps.sum(1), torch.ones(6))
    assert found.change[probe.task.instruction] == 0.0
    assert found.error > 0
    if not autoregressive:
        assert found.change["turn on the stove"] > 0
        batch = tiny.batch(range(6))
        with torch.no_grad(), FeatureTap(tiny.model, -1) as tap:
            output = tiny.model(**batch)
        torch.testing.assert_close(found.action, extract_features(tap.hidden, output.token_roles).action)
        predicted = tiny.collator.normaliser.normalise_actions(
            tiny.collator.normaliser.unnormalise_actions(output.predicted_actions)
        )
        error = (predicted - batch["actions"]).abs().mean()
        assert found.error == pytest.approx(float(error), abs=1e-5)


def test_a_probe_is_cropped_once() -> None:
    tiny = tiny_policy()
    policy, cropping = as_policy(tiny), as_policy(tiny)
    cropping.crop = True
    one, other = (look_at(each, probe_of(tiny), ["turn on the stove"]) for each in (policy, cropping))
    assert (one.error, one.change) == (other.error, other.change)
    assert cropping.crop


def test_a_deaf_policy_does_not_listen() -> None:
    """The embedding of every token is the same and every prompt as long as the other: nothing of it can be heard."""
    tiny = tiny_policy()
    with torch.no_grad():
        tiny.model.get_input_embeddings().weight[:] = tiny.model.get_input_embeddings().weight[5].clone()
    tokenizer = tiny.processor.tokenizer
    words = [instruction_words(tokenizer, text) for text in ("open the drawer", "turn the drawer")]
    assert words[0] == words[1]
    found = look_at(as_policy(tiny), probe_of(tiny), ["turn the drawer"])
    assert found.change["turn the drawer"] == 0.0
    assert look_at(as_policy(tiny_policy()), probe_of(tiny), ["turn the drawer"]).change["turn the drawer"] > 0


def test_the_words_of_an_instruction_are_found() -> None:
    tiny = tiny_policy()
    tokenizer = tiny.processor.tokenizer
    for instruction in ("open the drawer", "put the bowl on the plate", "Fly to the Moon"):
        ids = tokenizer(build_prompt(instruction))["input_ids"][1:]
        assert tokenizer.decode(ids[instruction_words(tokenizer, instruction)]).strip() == instruction.lower()


def test_probe_frames_are_spread_and_not_remembered() -> None:
    assert choose_episodes([3, 0, 1, 2, 1], [0, 2]) == [1, 3]
    assert choose_episodes([0], [0]) == []
    assert spread_rows(100, 4).tolist() == [0, 33, 66, 99]
    assert spread_rows(3, 32).tolist() == [0, 1, 2]


# --- a whole run


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Stream]:
    install_fakes(monkeypatch, tmp_path)

    def factory(name: str = "run", *, stream: dict[str, Any] | None = None, **training: Any) -> Stream:
        config = StreamConfig(**{**STREAM, **(stream or {})})
        return Stream(config, InfoVLAConfig(**{**TRAINING, "output_dir": str(tmp_path / name), **training}))

    return factory


@pytest.mark.libero
def test_a_run_that_asks_for_it(
    make: Callable[..., Stream], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with make(stream={"analyse": True}, learning_rate=0.05) as stream:
        stream.run()
    run = tmp_path / "run"
    analysis = Analysis.load(run)
    memory = ReplayMemory.load(run / "memory")
    kept = {
        (name, episode) for name, episode in zip(memory.frames["task"], memory.frames["episode_index"], strict=True)
    }
    assert [task.learned_at for task in analysis.tasks] == [0, 0, 1, 2]
    assert all((task.name, episode) not in kept for task in analysis.tasks for episode in task.episodes)
    assert all(task.frames == 12 and len(task.episodes) == 1 for task in analysis.tasks)
    seen = np.array([[True, True, True], [True, True, True], [False, True, True], [False, False, True]])
    for name in ("diffusion", "cka", "similarity", "swap_change", "listening", "action_error"):
        assert (~np.isnan(analysis.table(name)) == seen).all(), name
    for row, task in enumerate(analysis.tasks):
        for name in ("cka", "similarity", "listening"):
            assert analysis.table(name)[row, task.learned_at] == pytest.approx(1.0, abs=1e-6)
    assert (analysis.table("cka")[0, 1:] < 0.999).all()
    assert [pair.stages for pair in analysis.affinity] == [[0, 2], [0, 2], [1, 2]]
    np.testing.assert_allclose(np.mean(analysis.affinity[0].maps, axis=(1, 2)), 1.0, atol=1e-3)
    np.testing.assert_allclose(np.diagonal(analysis.matrices[0].similarity[0]), 1.0, atol=1e-3)
    assert np.array(analysis.matrices[0].similarity).shape == (2, 12, 12)
    assert np.isnan(analysis.old_mean("cka")[0])

    assert {file.name for file in (run / "report").iterdir()} >= FIGURES
    for name in FIGURES:
        with Image.open(run / "report" / name) as picture:
            assert min(picture.size) > 300
    page = Page((run / "report/index.html").read_text())
    assert "What was kept, and why" in page.text
    assert "affinity.png" in page.links
    assert all((run / "report" / link).is_file() for link in page.links)

    before = (run / "analysis.json").read_bytes()
    modified = (run / "analysis.json").stat().st_mtime_ns
    with make(learning_rate=0.05) as stream:  # asking no more is no other configuration
        stream.run()
    with make(stream={"analyse": True}, learning_rate=0.05) as stream:
        stream.run()
    assert (run / "analysis.json").stat().st_mtime_ns == modified
    again = analyse_run(run, demonstrations=run / "demonstrations")
    assert again["temperature"] == AFFINITY_TEMPERATURE != Results.load(run / "results.json").config["temperature"]
    assert again == json.loads(before)

    capsys.readouterr()
    figure = tmp_path / "comparison.png"
    assert main(["analyse", str(run), "--output", str(figure)]) == 0
    text = capsys.readouterr().out
    assert "infovla (1 run)" in text
    assert "analysis:" not in text  # it was not analysed again
    assert main(["analyse", f"ours={run}"]) == 0
    assert "ours (1 run)" in capsys.readouterr().out
    with Image.open(figure) as picture:
        assert min(picture.size) > 300


@pytest.mark.libero
def test_a_run_that_does_not_ask_is_analysed_afterwards(
    make: Callable[..., Stream], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with make(stream={"stream": "B1-1N1"}) as stream:
        stream.run()
    run = tmp_path / "run"
    assert not (run / "analysis.json").exists()
    assert not (run / "report/cka.png").exists()
    assert main(["analyse", str(run), "--frames", "3"]) == 1
    assert "at least 4 frames" in capsys.readouterr().err
    assert main(["analyse", str(run), "--frames", "5"]) == 0
    assert "mean over the old tasks" in capsys.readouterr().out
    analysis = Analysis.load(run)
    assert [task.frames for task in analysis.tasks] == [5, 5]
    assert analysis.listening[0] == [None, None]  # nothing else was known then
    assert analysis.listening[1] == [None, 1.0]
    assert (run / "report/cka.png").exists()
    assert is_analysed(run)
    frames = Analysis.load(run).frames
    assert is_analysed(run, frames=frames)
    assert not is_analysed(run, frames=frames + 1)
    shorter = Results.load(run / "results.json")
    shorter.add_stage(2, {})
    shorter.save(run / "results.json")
    assert not is_analysed(run)


@pytest.mark.libero
def test_too_few_demonstrations_are_named(make: Callable[..., Stream], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="demonstrations is 1, memory_trajectories 1"):
        StreamConfig(**{**STREAM, "demonstrations": 1, "analyse": True})
    with (
        pytest.raises(RunError, match="multitask trains on all; leave analyse out"),
        make(stream={"analyse": True}, method="multitask"),
    ):
        pass
    with make(stream={"stream": "B1-1N1", "memory_trajectories": 2}) as stream:
        stream.run()
    with pytest.raises(ValueError, match=r"all 2 demonstrations of .* are in the replay memory"):
        analyse_run(tmp_path / "run", demonstrations=tmp_path / "run/demonstrations")


# --- the file


def small(method: str = "er", *, shift: float = 0.0, **options: Any) -> Analysis:
    tasks = [
        ProbedTask("a", "open it", 0, 4, [1]),
        ProbedTask("b", "close it", 0, 4, [1]),
        ProbedTask("c", "x", 1, 4, [0]),
    ]
    tables = {
        "diffusion": [[0.5, 0.6 + shift, 0.7], [0.9, 0.9, 0.9], [None, 0.2, 0.4]],
        "cka": [[1.0, 0.8, 0.6], [1.0, 0.9, 0.8], [None, 1.0, 0.5]],
        "similarity": [[1.0, 0.8, 0.6], [1.0, 0.9, 0.8], [None, 1.0, -0.5]],
        "swap_change": [[0.2, 0.1, 0.0], [0.2, 0.1, 0.0], [None, 0.3, 0.3]],
        "listening": [[1.0, 0.5, 0.0], [1.0, 0.5, 0.0], [None, 1.0, 1.0]],
        "action_error": [[0.1, 0.2, 0.3], [0.1, 0.2, 0.3], [None, 0.1, 0.1]],
    }
    head: dict[str, Any] = {
        "method": method, "stream": "B2-2N1", "suite": "libero_goal", "seed": 0, "base_model": "tiny",
        "assets": "primitive", "frames": 4, "demonstrations": 2, "tap_layer": -1, "temperature": 0.1, "stages": 3,
    }  # fmt: skip
    return Analysis(**{**head, "tasks": tasks, **tables, **options})


def test_means_are_over_the_old_tasks() -> None:
    analysis = small()
    np.testing.assert_allclose(analysis.old_mean("cka"), [np.nan, 0.85, 1.9 / 3])
    np.testing.assert_allclose(analysis.old_mean("diffusion", change=True), [np.nan, 0.05, 0.4 / 3])


def test_a_comparison_gathers_runs_by_method(tmp_path: Path) -> None:
    comparison = compare([small(), small("infovla"), small(shift=0.2, seed=1)])
    assert comparison.runs == {"er": 2, "infovla": 1}
    np.testing.assert_allclose(comparison.values["diffusion"]["er"][:, 1], [0.75, 0.85])
    line = next(line for line in comparison.table().splitlines() if line.startswith("er (2 runs)"))
    assert line.split()[3:] == ["1", "0.800", "0.100", "0.850", "0.500", "0.200"]
    with pytest.raises(ValueError, match="suite is libero_goal and libero_object"):
        compare([small(), small(suite="libero_object")])
    with pytest.raises(ValueError, match="two runs of er have seed 0 and the same tasks"):
        compare([small(), small(shift=0.2)])
    named = compare([small(), small(shift=0.2), small(shift=0.4, seed=1)], [None, "variant", "variant"])
    assert named.runs == {"er": 1, "variant": 2}
    with pytest.raises(ValueError, match="nothing to compare"):
        compare([])
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        small(name).save(tmp_path / name)
    assert compare_analyses([tmp_path / "one", tmp_path / "two"], tmp_path / "figure.png").runs == {"one": 1, "two": 1}
    assert (tmp_path / "figure.png").stat().st_size > 10000


def test_an_analysis_that_was_kept_without_its_run_is_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small("infovla").save(tmp_path)
    figure = tmp_path / "figure.png"
    assert main(["analyse", str(tmp_path), "--output", str(figure)]) == 0
    text = capsys.readouterr().out
    assert "infovla (1 run)" in text
    assert "report:" not in text
    assert figure.exists()
    assert main(["analyse", str(tmp_path), "--again"]) == 1
    assert "results.json does not exist" in capsys.readouterr().err
    (tmp_path / "analysis.json").write_text("{")
    assert main(["analyse", str(tmp_path)]) == 1
    assert "analysis.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("figure.txt", "figure.txt: a figure is written as .png, .pdf or .svg; name it figure.png"),
        ("figure", "name it figure.png"),
        ("", "is a folder; name a file for the figure"),
    ],
)
def test_a_figure_s_name_is_checked_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, message: str
) -> None:
    small().save(tmp_path)
    monkeypatch.setattr("infovla_peft.analysis.analyse_run", lambda *_, **__: pytest.fail("worked on"))
    for more in ([], ["--again"]):
        assert main(["analyse", str(tmp_path), "--output", str(tmp_path / name), *more]) == 1
        assert message in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["analysis.json"]


@pytest.mark.parametrize(("suffix", "start"), [(".PNG", b"\x89PNG"), (".pdf", b"%PDF"), (".svg", b"<?xml")])
def test_a_figure_is_written_as_its_suffix_says(tmp_path: Path, suffix: str, start: bytes) -> None:
    small().save(tmp_path)
    compare_analyses([tmp_path], tmp_path / f"figure{suffix}")
    assert (tmp_path / f"figure{suffix}").read_bytes().startswith(start)


def test_a_value_has_one_colour_in_the_map_and_in_its_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    save = analysis_figures.save_figure
    monkeypatch.setattr(
        analysis_figures, "save_figure", lambda figure, path: (drawn.append(figure), save(figure, path))
    )
    Image.new("RGB", (24, 24), (70, 70, 70)).save(tmp_path / "a.png")
    pair = AffinityPair("a", "a.png", [0, 2], [0.5, 0.5], [[[0.0, 4.0]], [[1.0, 2.0]]])
    analysis_figures.draw_affinity(
        [analysis_figures.AnalysedRun("", small(affinity=[pair]), tmp_path)], tmp_path / "affinity.png"
    )
    with Image.open(tmp_path / "affinity.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)

    def colour(axes: Axes, x: float, y: float) -> Any:
        """In the picture, at a place in axes given as parts of their width and height from below."""
        left, bottom, width, height = axes.get_position().bounds
        rows, columns, _ = pixels.shape
        return pixels[int((1 - bottom - y * height) * rows), int((left + x * width) * columns)]

    _, learned, last, bar = drawn[0].axes
    for axes, x, value in ((learned, 0.25, 0.0), (learned, 0.75, 4.0), (last, 0.25, 1.0), (last, 0.75, 2.0)):
        there = colour(bar, 0.5, np.clip(value / 4.0, 0.01, 0.99))
        np.testing.assert_allclose(colour(axes, x, 0.5), there, atol=6)


def test_the_scene_is_seen_through_its_map(tmp_path: Path) -> None:
    scene = np.full((24, 24, 3), 200, np.uint8)
    scene[::2] = 40
    Image.fromarray(scene).save(tmp_path / "a.png")
    pair = AffinityPair("a", "a.png", [0, 2], [0.5, 0.5], [[[1.0, 8.0]], [[1.0, 4.0]]])
    runs = [analysis_figures.AnalysedRun("", small(affinity=[pair]), tmp_path)]
    analysis_figures.draw_affinity(runs, tmp_path / "affinity.png")
    with Image.open(tmp_path / "affinity.png") as picture:
        pixels = np.asarray(picture.convert("L")).astype(int)
    rows = pixels[-450:-30, [530, 1100]]  # of the maps of 1.0, right after learning and after the last stage
    assert (rows.max(0) - rows.min(0) > 70).all()


def test_runs_are_compared_on_one_scale_and_say_what_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn: dict[str, Figure] = {}
    monkeypatch.setattr(analysis_figures, "save_figure", lambda figure, path: drawn.update({path.name: figure}))
    for seed, top in enumerate((2.0, 7.0)):
        pair = AffinityPair("a", "a.png", [0, 2], [0.5, 0.5], [[[0.0, top]], [[1.0, 1.0]]])
        alike = SimilarityPair("a", [0, 2], [[[1.0, 0.5], [0.5, 1.0]], [[0.9, top / 10], [0.1, 0.9]]])
        run = tmp_path / str(seed)
        run.mkdir()
        small(seed=seed, affinity=[pair], matrices=[alike]).save(run)
    runs = [str(tmp_path / "0"), str(tmp_path / "1")]

    def maps_of(figure: Figure) -> list[Any]:
        return [image for axes in figure.axes for image in axes.images]

    assert main(["analyse", *runs, "--output", str(tmp_path / "inside.png")]) == 0  # analysis.json alone
    printed = capsys.readouterr().out
    assert [line for line in printed.splitlines() if line.startswith("figure: ")] == [
        f"figure: {tmp_path / name}" for name in ("inside.png", "inside_affinity.png", "inside_similarity.png")
    ]
    assert {image.get_clim() for image in maps_of(drawn["inside_affinity.png"])} == {(0.0, 7.0)}
    assert len(maps_of(drawn["inside_affinity.png"])) == 4  # without scenes
    shown = [image.get_array().tolist() for image in maps_of(drawn["inside_similarity.png"])]
    assert shown[1] == [[0.9, 0.2], [0.1, 0.9]]
    assert shown[3] == [[0.9, 0.7], [0.1, 0.9]]
    figure = drawn["inside.png"]
    assert "bands: from the lowest run to the highest" in figure.texts[-1].get_text()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["er (2 runs)"]
    units = [
        "change of their entropy",
        "CKA of the action features",
        "change of the actions",
        "mean absolute difference",
    ]
    assert all(axes.texts[0].get_text().startswith(unit) for axes, unit in zip(figure.axes, units, strict=True))

    for run in runs:
        Image.new("RGB", (24, 24)).save(Path(run) / "a.png")
    assert main(["analyse", *runs, "--output", str(tmp_path / "inside.png")]) == 0
    assert len(maps_of(drawn["inside_affinity.png"])) == 8
    titles = [axes.get_title(loc="left") for axes in drawn["inside_affinity.png"].axes]
    assert titles[3] == "er, seed 1\nafter the last stage (+2): diffusion 0.50"


def test_small_changes_of_diffusion_fill_no_axis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(analysis_figures, "save_figure", lambda figure, _: drawn.append(figure))
    still = small(diffusion=[[0.9, 0.901, 0.902], [0.9, 0.9, 0.899], [None, 0.9, 0.9]])
    analysis_figures.draw_analysis_comparison(compare([still]), tmp_path / "figure.png")
    analysis_figures.draw_over_stages(still, "diffusion", tmp_path / "figure.png")
    for figure in drawn:
        low, high = figure.axes[0].get_ylim()
        assert high - low >= 0.1 - 1e-9


@pytest.mark.parametrize("methods", [1, 3, 5, 11, 25])
def test_a_comparison_s_legend_has_its_own_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, methods: int
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(analysis_figures, "save_figure", lambda figure, _: drawn.append(figure))
    names = [
        f"{'er' if methods == 11 and index % 2 else 'infovla_with_a_long_name'}{index}" for index in range(methods)
    ]
    analysis_figures.draw_analysis_comparison(compare([small()] * methods, names), tmp_path / "figure.png")
    (figure,) = drawn
    (legend,) = figure.legends
    place = legend.get_window_extent()
    assert [text.get_text() for text in legend.get_texts()] == [f"{name} (1 run)" for name in names]
    note = figure.texts[-1].get_window_extent()
    assert note.y1 < place.y0
    assert figure.bbox.x0 <= place.x0 < place.x1 <= figure.bbox.x1
    assert figure.bbox.y0 <= note.y0
    for axes in figure.axes:
        bounds = axes.get_tightbbox()
        assert bounds is not None
        assert place.y1 < bounds.y0
        assert bounds.y1 <= figure.bbox.y1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[: len(text) // 2], "no valid JSON"),
        (lambda text: text.replace('"format_version": 1', '"format_version": 2'), "update infovla-peft"),
        (lambda text: text.replace("0.85", "NaN").replace("0.6", "NaN"), "NaN is not allowed"),
        (lambda text: text.replace('"cka"', '"cca"'), "the content lacks cka and has an unknown key cca"),
        (lambda text: text.replace('"learned_at": 1', '"learned_at": 2'), r"diffusion\[2\]\[1\] must be null"),
        (lambda text: text.replace("0.9", "1.9"), r"diffusion\[1\]\[0\] must be a number from 0 to 1"),
        (lambda text: text.replace('"stages": 3', '"stages": 2'), r"diffusion\[0\] must be an array of 2"),
        (lambda text: text.replace("a.png", "../a.png"), "a relative path inside the run's folder"),
        (lambda text: text.replace('"task": "a"', '"task": "z"'), "a task of the run"),
        (lambda text: text.replace("-0.25", "-1.25"), r"matrices\[0\]\.similarity"),
        (lambda text: "[]", "the content must be an object"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, damage: Callable[[str], str], message: str) -> None:
    pair = [[[1.0, 1.0], [0.5, 1.5]], [[1.0, 1.0], [1.0, 1.0]]]
    analysis = Analysis.from_dict(
        {
            **small().to_dict(),
            "affinity": [
                {"task": "a", "image": "analysis/a.png", "stages": [0, 2], "diffusion": [0.5, 0.75], "maps": pair}
            ],
            "matrices": [{"task": "a", "stages": [0, 2], "similarity": [[[-0.25, 1]], [[0.5, 0.5]]]}],
        }
    )
    analysis.save(tmp_path)
    assert Analysis.load(tmp_path) == analysis
    file = tmp_path / "analysis.json"
    file.write_text(damage(file.read_text()))
    with pytest.raises(AnalysisError, match=message):
        Analysis.load(tmp_path)


def test_a_report_with_a_damaged_or_incomplete_analysis_stays_as_it_was(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="infovla analyse"):
        Analysis.load(tmp_path)
    write_run(tmp_path, logs=False)
    page = write_report(tmp_path)
    before = page.read_bytes()
    (tmp_path / "analysis.json").write_text("{")
    with pytest.raises(AnalysisError, match="analyse the run again"):
        write_report(tmp_path)
    small(affinity=[]).save(tmp_path)
    content = json.loads((tmp_path / "analysis.json").read_text())
    pair = [[[1.0]], [[1.0]]]
    content["affinity"] = [{"task": "a", "image": "a.png", "stages": [0, 2], "diffusion": [0.5, 0.5], "maps": pair}]
    (tmp_path / "analysis.json").write_text(json.dumps(content))
    with pytest.raises(AnalysisError, match=r"a\.png is missing"):
        write_report(tmp_path)
    assert page.read_bytes() == before
    small().save(tmp_path)
    write_report(tmp_path)
    assert {file.name for file in page.parent.iterdir()} & FIGURES == FIGURES - {"affinity.png", "similarity.png"}
    assert {f"{quantity.figure}.png" for quantity in analysis_figures.QUANTITIES.values()} <= set(
        Page(page.read_text()).links
    )

"""What the methods add: negatives, and terms that equal the losses on the right anchors."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch.nn import functional as F

from infovla_peft.config import InfoVLAConfig
from infovla_peft.features import Features
from infovla_peft.losses import cross_modal_mi_from_summaries, replay_anchor_contrastive_loss, summarize_cross_modal
from infovla_peft.memory import Anchors
from infovla_peft.methods import METHODS, Contrast, Negatives, make_terms

FRAMES, PATCHES, WORDS, WIDTH = 20, 4, 3, 6
TRAJECTORY = torch.arange(FRAMES) // 10  # two trajectories of ten frames
FRAME = torch.arange(FRAMES) % 10


def config(tmp_path: Path, **options: Any) -> InfoVLAConfig:
    return InfoVLAConfig(**{"output_dir": str(tmp_path), "use_cpu": True, **options})


def features(rows: int, seed: int) -> Features:
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random)

    mask = torch.ones(rows, WORDS, dtype=torch.bool)
    return Features(normal(rows, WIDTH), normal(rows, PATCHES, WIDTH), normal(rows, WORDS, WIDTH), mask)


@pytest.fixture(scope="module")
def anchors() -> Anchors:
    teacher = features(2 * FRAMES, seed=1)  # two views
    summary = summarize_cross_modal(teacher.vision, teacher.language)
    output = torch.randn(2 * FRAMES, 4, 7, generator=torch.Generator().manual_seed(4))
    views = {"action": teacher.action, "affinity": summary.affinity, "fused": summary.fused, "output": output}
    return Anchors(
        **{name: tensor.view(2, FRAMES, *tensor.shape[1:]) for name, tensor in views.items()},
        words=torch.full((FRAMES,), WORDS),
        shifts=torch.zeros(2, FRAMES, 2, dtype=torch.long),
        spec={},
    )


def pairs(*rows: tuple[int, int]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.long).view(-1, 2)


def contrast(anchors: Anchors, own: torch.Tensor, peers: torch.Tensor, **options: int) -> Contrast:
    return Negatives(TRAJECTORY, FRAME, **{"bank_size": 0, "window": 2, "seed": 0, **options})(anchors, own, peers)


def test_every_method_has_a_row() -> None:
    assert tuple(METHODS) == get_args(get_type_hints(InfoVLAConfig)["method"])
    assert all(method.replay or method.counterfactual or not method.terms for method in METHODS.values())


def test_negatives_of_the_mini_batch_are_those_of_all_processes(anchors: Anchors) -> None:
    found = contrast(anchors, pairs((0, 0), (0, 5)), pairs((1, 1), (0, 11)))
    assert found.negatives.tolist() == [[1, 1], [0, 11]]
    # Frame 1 is within two frames of frame 0; frame 11 is of the other trajectory.
    assert found.exclude.tolist() == [[True, False, True, False], [False, True, False, False]]


def test_negatives_of_the_bank_do_not_depend_on_the_batch(anchors: Anchors) -> None:
    found = contrast(anchors, pairs((0, 0), (1, 5)), pairs((1, 1)), bank_size=8)
    assert found.negatives.shape == (8, 2)
    assert not found.negatives[:, 0].any()  # the frames themselves
    assert found.exclude[:, :2].all()
    for row, frame in enumerate((0, 5)):
        for column, candidate in enumerate(found.negatives[:, 1].tolist()):
            near = TRAJECTORY[candidate] == 0 and abs(FRAME[candidate] - frame) <= 2
            assert found.exclude[row, 2 + column] == near
    whole = contrast(anchors, pairs((0, 0)), pairs(), bank_size=1000)
    assert whole.negatives[:, 1].tolist() == list(range(FRAMES))
    again = contrast(anchors, pairs((0, 0)), pairs(), bank_size=8)
    assert torch.equal(again.negatives, found.negatives)


@pytest.mark.parametrize("bank_size", [0, 8])
def test_rac_is_the_loss_on_the_anchors_of_its_views(tmp_path: Path, anchors: Anchors, bank_size: int) -> None:
    (rac,) = make_terms(config(tmp_path, lambda_output=0.0, lambda_cmi=0.0, temperature=0.3))
    student, own, peers = features(3, seed=2), pairs((0, 0), (1, 5), (0, 12)), pairs((1, 17))
    chosen = contrast(anchors, own, peers, bank_size=bank_size)
    value = rac(student, chosen)
    expected = []
    for row, (view, frame) in enumerate(own.tolist()):
        candidates = [anchors.action[view, frame]]
        others = chosen.negatives if bank_size else torch.cat((own, peers))
        for other_view, other in others.tolist():
            near = TRAJECTORY[other] == TRAJECTORY[frame] and abs(FRAME[other] - FRAME[frame]) <= 2
            if not near:
                candidates.append(anchors.action[other_view, other])
        logits = torch.stack([F.cosine_similarity(student.action[row], each, dim=0) / 0.3 for each in candidates])
        expected.append(-logits.log_softmax(0)[0])
    assert value is not None
    torch.testing.assert_close(value, torch.stack(expected).mean())
    assert rac.weight == 0.1


@pytest.mark.parametrize("mode", ["infonce", "relational", "paper"])
def test_cmi_is_the_loss_on_stored_summaries(tmp_path: Path, anchors: Anchors, mode: str) -> None:
    (cmi,) = make_terms(config(tmp_path, lambda_output=0.0, lambda_rac=0.0, cmi_mode=mode))
    student, chosen = features(3, seed=3), contrast(anchors, pairs((0, 0), (1, 5), (0, 12)), pairs((1, 17)))
    across = {"bank": anchors.fused[1, 17][None], "exclude": chosen.exclude} if mode != "paper" else {}
    expected = cross_modal_mi_from_summaries(
        summarize_cross_modal(student.vision, student.language),
        anchors.summary(chosen.own, WORDS),
        mode=mode,  # type: ignore[arg-type]
        joint_network=cmi.network,
        **across,
    )
    value = cmi(student, chosen)
    assert value is not None
    torch.testing.assert_close(value, expected)
    assert (cmi.network is not None) == (mode == "paper")


def test_terms_without_information(tmp_path: Path, anchors: Anchors) -> None:
    rac, cmi = make_terms(config(tmp_path, lambda_output=0.0, cmi_mode="infonce"))
    alone = contrast(anchors, pairs((0, 0), (0, 1)), pairs(), window=2)
    assert rac(features(2, seed=2), alone) is None
    assert cmi(features(2, seed=2), alone) is None
    (relational,) = make_terms(config(tmp_path, lambda_output=0.0, lambda_rac=0.0, cmi_mode="relational"))
    assert relational(features(2, seed=2), alone) is not None  # within a sample there is a structure


def test_a_term_at_its_anchors_is_near_zero(tmp_path: Path, anchors: Anchors) -> None:
    rac, cmi = make_terms(config(tmp_path, lambda_output=0.0, temperature=0.01))
    teacher = features(2 * FRAMES, seed=1)
    own = pairs((0, 0), (0, 5), (0, 12))
    student = Features(*(tensor[own[:, 1]] for tensor in teacher[:4]))
    chosen = contrast(anchors, own, pairs())
    for term in (rac, cmi):
        value = term(student, chosen)
        assert value is not None
        assert value < 0.05
    assert replay_anchor_contrastive_loss(student.action, student.action, temperature=0.01) < 0.05


@pytest.mark.parametrize("kind", ["actions", "logits"])
def test_output_is_the_distance_to_the_stored_answers(tmp_path: Path, anchors: Anchors, kind: Any) -> None:
    (term,) = make_terms(config(tmp_path, method="der++", lambda_output=0.5), kind)
    own = pairs((0, 0), (1, 5), (0, 12))
    answers = torch.randn(3, 4, 7)
    value = term(features(3, seed=2)._replace(output=answers), contrast(anchors, own, pairs()))
    stored = torch.stack([anchors.output[view, row] for view, row in own.tolist()])
    if kind == "actions":
        expected = (answers - stored).abs().mean()
    else:
        expected = F.kl_div(answers.log_softmax(-1), stored.log_softmax(-1), reduction="none", log_target=True)
        expected = expected.sum(-1).mean()
    assert value is not None
    torch.testing.assert_close(value, expected)
    assert term.weight == 0.5
    assert term(features(0, seed=2), contrast(anchors, pairs(), pairs())) is None

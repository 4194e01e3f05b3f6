"""What the methods add: negatives, and terms that equal the losses on the right anchors."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from tiny_policy import TinyPolicy, tiny_policy
from torch.nn import functional as F

from infovla_peft.adapter_files import AdapterError
from infovla_peft.adapters import adapter_parameters, add_adapter, merge_adapters
from infovla_peft.config import InfoVLAConfig
from infovla_peft.consolidation import Consolidation
from infovla_peft.features import Features, extract_features
from infovla_peft.interference import interference, most_interfered, sample_losses
from infovla_peft.losses import (
    SMOOTH_L1_BETA,
    cross_modal_mi_from_summaries,
    replay_anchor_contrastive_loss,
    summarize_cross_modal,
)
from infovla_peft.memory import Anchors
from infovla_peft.methods import METHODS
from infovla_peft.models.openvla.sequence import token_roles
from infovla_peft.terms import Contrast, Negatives, make_terms

FRAMES, PATCHES, WORDS, WIDTH = 20, 4, 3, 6
TRAJECTORY = torch.arange(FRAMES) // 10  # two trajectories of ten frames
FRAME = torch.arange(FRAMES) % 10


def config(tmp_path: Path, **options: Any) -> InfoVLAConfig:
    as_printed = {"rac_targets": "hard", "rac_center": False}  # Eq. 1, unless a test is about what replaces it
    return InfoVLAConfig(**{"output_dir": str(tmp_path), "use_cpu": True, **as_printed, **options})


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
    assert rac.weight == 0.02


@pytest.mark.parametrize("targets", ["hard", "soft"])
def test_rac_about_the_center_does_not_see_a_common_offset(tmp_path: Path, anchors: Anchors, targets: str) -> None:
    options = {"lambda_output": 0.0, "lambda_cmi": 0.0, "rac_targets": targets}
    student, offset = features(3, seed=2), torch.full((1, anchors.action.shape[-1]), 5.0)
    moved = replace(anchors, action=anchors.action + offset)
    rows = pairs((0, 0), (1, 5), (0, 12))
    for center in (False, True):
        (rac,) = make_terms(config(tmp_path, rac_center=center, **options))
        here = rac(student, contrast(anchors, rows, pairs(), bank_size=8))
        there = rac(student._replace(action=student.action + offset), contrast(moved, rows, pairs(), bank_size=8))
        assert here is not None
        assert there is not None
        assert torch.allclose(here, there, rtol=1e-4) == center
    with pytest.raises(ValueError, match="anchor_bank above 0"):
        config(tmp_path, rac_center=True, anchor_bank=0)


@pytest.mark.parametrize("mode", ["infonce", "relational", "paper"])
def test_cmi_is_the_loss_on_stored_summaries(tmp_path: Path, anchors: Anchors, mode: str) -> None:
    (cmi,) = make_terms(config(tmp_path, lambda_output=0.0, lambda_rac=0.0, cmi_mode=mode, temperature=0.1))
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


@pytest.mark.parametrize("bank_size", [0, 8])
@pytest.mark.parametrize("mode", ["infonce", "relational", "paper"])
def test_no_term_waits_for_an_accelerator(
    tmp_path: Path, anchors: Anchors, mode: str, bank_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the device "meta" there are no values: whoever asks for one, as `bool(...)` would on a GPU, gets an error."""
    monkeypatch.setattr(torch, "autocast", lambda *_args, **_options: nullcontext())  # knows no "meta"
    chosen = Negatives(TRAJECTORY, FRAME, bank_size=bank_size, window=2, seed=0)(
        anchors, pairs((0, 0), (1, 5)), pairs((1, 17)), "meta"
    )
    length = 1 + PATCHES + WORDS + 5
    roles = token_roles(torch.full((4,), WORDS + 2), length, PATCHES, False, 4).to("meta")
    hidden = torch.empty(4, length, WIDTH, device="meta", requires_grad=True)
    student = extract_features(hidden, roles, slice(2, None), longest=chosen.words)
    student = student._replace(output=torch.empty(2, 4, 7, device="meta", requires_grad=True))
    options = {"cmi_mode": mode, "rac_center": bool(bank_size), "rac_targets": "soft"}
    terms = make_terms(config(tmp_path, **options))
    assert len(terms) == 3
    for term in terms:
        if term.network is not None:
            term.network.to("meta")
        value = term(student, chosen)
        assert value is not None
        assert value.device.type == "meta"
        value.backward(retain_graph=True)


def test_the_bank_is_gathered_once(anchors: Anchors) -> None:
    negatives = Negatives(TRAJECTORY, FRAME, bank_size=8, window=2, seed=0)
    first, second = (negatives(anchors, pairs((0, row)), pairs()) for row in (0, 5))
    assert first.bank is second.bank is negatives.bank
    assert torch.equal(first.bank.action, anchors.action[0, first.negatives[:, 1]])
    assert torch.equal(first.bank.fused, anchors.fused[0, first.negatives[:, 1]])


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
        expected = F.smooth_l1_loss(answers, stored, beta=SMOOTH_L1_BETA)
    else:
        expected = F.kl_div(answers.log_softmax(-1), stored.log_softmax(-1), reduction="none", log_target=True)
        expected = expected.sum(-1).mean()
    assert value is not None
    torch.testing.assert_close(value, expected)
    assert term.weight == 0.5
    assert term(features(0, seed=2), contrast(anchors, pairs(), pairs())) is None


# --- methods that change more than the terms ---


def moved_adapter(tmp_path: Path, **options: Any) -> tuple[TinyPolicy, Any]:
    policy = tiny_policy()
    model = add_adapter(policy.model, "one", config(tmp_path, lora_r=4, **options))
    torch.manual_seed(0)
    for _, parameter in adapter_parameters(model, "one"):
        torch.nn.init.normal_(parameter, 0, 0.1)
    return policy, model


def split(policy: TinyPolicy) -> tuple[dict[str, Any], dict[str, Any]]:
    return policy.batch([60, 61, 65]), policy.batch([0, 5, 13, 26, 30, 41])


def test_mir_chooses_what_a_step_hurts_most(tmp_path: Path) -> None:
    policy, model = moved_adapter(tmp_path)
    current, candidates = split(policy)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    chosen = most_interfered(model, current, candidates, 2, learning_rate=0.5)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    # By hand: one sample at a time, before and after a real step.
    rows = [{name: tensor[row : row + 1] for name, tensor in candidates.items()} for row in range(6)]
    with torch.no_grad():
        start = torch.stack([model(**row).loss for row in rows])
    torch.testing.assert_close(sample_losses(model, candidates, model(**candidates)), start, atol=1e-5, rtol=1e-4)
    step = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(**current).loss.backward()
    step.step()
    with torch.no_grad():
        harm = torch.stack([model(**row).loss for row in rows]) - start
    assert set(chosen.tolist()) == set(harm.topk(2).indices.tolist())


def test_the_virtual_step_of_mir_is_the_optimisers(tmp_path: Path) -> None:
    policy, model = moved_adapter(tmp_path)
    current, candidates = split(policy)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adam = torch.optim.AdamW(trained, lr=0.05, weight_decay=0.0)
    # Without a step behind it there are no moments yet; Adam's first step is one of signs, ours one of descent.
    assert torch.equal(
        interference(model, current, candidates, 0.5, adam), interference(model, current, candidates, 0.5)
    )
    for rows in ([60, 62], [63, 64]):
        adam.zero_grad()
        model(**policy.batch(rows)).loss.backward()
        adam.step()
    found = interference(model, current, candidates, 0.05, adam)
    state = {id(parameter): adam.state[parameter]["exp_avg"].clone() for parameter in trained}
    with torch.no_grad():
        start = sample_losses(model, candidates, model(**candidates))
    adam.zero_grad()
    model(**current).loss.backward()
    assert all(torch.equal(adam.state[parameter]["exp_avg"], state[id(parameter)]) for parameter in trained)
    adam.step()
    with torch.no_grad():
        harm = sample_losses(model, candidates, model(**candidates)) - start
    assert harm.abs().max() > 1e-3
    torch.testing.assert_close(found, harm, atol=1e-6, rtol=1e-4)


def test_sample_losses_of_action_tokens(tmp_path: Path) -> None:
    policy = tiny_policy(autoregressive=True)
    batch = policy.batch([0, 14])
    for row, found in enumerate(sample_losses(policy.model, batch, policy.model(**batch))):
        alone = {name: tensor[row : row + 1] for name, tensor in batch.items()}
        labels = alone["labels"].clone()
        labels[labels == policy.model.config.text_config.eos_token_id] = -100
        length = int(alone["attention_mask"].sum())
        logits = policy.model(
            **{name: tensor[:, :length] if tensor.ndim == 2 else tensor for name, tensor in alone.items()}
        ).logits
        bins = logits[..., policy.model.config.action_token_begin_id + 1 :][..., :256]
        patches = bins.shape[1] - length
        places = (labels[0, 1:length] != -100).nonzero().flatten() + patches
        targets = labels[0, 1:length][places - patches] - policy.model.config.action_token_begin_id - 1
        torch.testing.assert_close(found, F.cross_entropy(bins[0, places], targets), atol=1e-5, rtol=1e-4)


def test_fisher_is_the_mean_squared_gradient_of_samples(tmp_path: Path) -> None:
    policy, model = moved_adapter(tmp_path)
    data = policy.dataset.like(policy.task("open_the_drawer"))
    found = Consolidation.measure(model, "one", data, policy.collator, samples=100, seed=0)  # all 24
    expected: dict[str, torch.Tensor] = {}
    for row in range(len(data)):
        model.zero_grad()
        model(**policy.collator(data.__getitems__([row]))).loss.backward()
        for name, parameter in adapter_parameters(model, "one"):
            plain = name.replace(".one.", ".")
            expected[plain] = expected.get(plain, 0.0) + parameter.grad**2 / len(data)  # type: ignore[operator]
    assert found.fisher.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found.fisher[name], value, atol=1e-8, rtol=1e-3)
    assert found.penalty(model, "one") == 0
    moved = 0.0
    with torch.no_grad():
        for name, parameter in adapter_parameters(model, "one"):
            parameter.add_(0.3)
            moved += 0.5 * 0.09 * float(found.fisher[name.replace(".one.", ".")].sum())
    assert found.penalty(model, "one").item() == pytest.approx(moved, rel=1e-4)
    later = Consolidation.measure(model, "one", data, policy.collator, samples=4, seed=0, before=found, decay=0.5)
    alone = Consolidation.measure(model, "one", data, policy.collator, samples=4, seed=0)
    for name, value in alone.fisher.items():
        torch.testing.assert_close(later.fisher[name], value + 0.5 * found.fisher[name])
    three = Consolidation.measure(model, "one", data, policy.collator, samples=4, seed=0, tasks=3)
    for name, value in alone.fisher.items():
        torch.testing.assert_close(three.fisher[name], 3 * value)
    later.save(tmp_path / "fisher.safetensors", stage=2)
    again = Consolidation.load(tmp_path / "fisher.safetensors", stage=2)
    for name, value in later.reference.items():
        assert torch.equal(again.reference[name], value)
        assert torch.equal(again.fisher[name], later.fisher[name])


def test_merged_adapters_are_the_sum_of_their_updates(tmp_path: Path) -> None:
    _, model = moved_adapter(tmp_path)
    add_adapter(model, "two", config(tmp_path, lora_r=2, lora_alpha=8))
    for _, parameter in adapter_parameters(model, "two"):
        torch.nn.init.normal_(parameter, 0, 0.1)
    updates = {}
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight") and "one" in module.lora_A:
            updates[name] = 0.5 * (module.get_delta_weight("one") + module.get_delta_weight("two"))
    merged = merge_adapters(model, ["one", "two"], "both", weight=0.5)
    assert merged.active_adapter == "both"
    assert not any(parameter.requires_grad for parameter in merged.parameters())
    assert updates
    for name, update in updates.items():
        torch.testing.assert_close(merged.get_submodule(name).get_delta_weight("both"), update, atol=1e-6, rtol=1e-5)
    with pytest.raises(AdapterError, match="cannot merge"):
        merge_adapters(model, ["one", "zero"], "other")
    with pytest.raises(ValueError, match="rank must be at least 0"):
        merge_adapters(model, ["one", "two"], "other", rank=-1)


def test_adapters_merged_to_a_lower_rank_are_the_nearest_to_the_sum(tmp_path: Path) -> None:
    _, model = moved_adapter(tmp_path)
    add_adapter(model, "two", config(tmp_path, lora_r=2, lora_alpha=8))
    for _, parameter in adapter_parameters(model, "two"):
        torch.nn.init.normal_(parameter, 0, 0.1)
    merge_adapters(model, ["one", "two"], "exact", weight=0.5)
    ranks = model.peft_config["exact"].r
    for rank, into in ((2 * ranks + 16, "whole"), (1, "low")):
        merge_adapters(model, ["one", "two"], into, weight=0.5, rank=rank)
        assert list(model.peft_config) == [*dict.fromkeys(["one", "two", "exact", "whole", into])]
    assert (model.peft_config["whole"].r, model.peft_config["low"].r) == (ranks, 1)
    layers = [module for _, module in model.named_modules() if hasattr(module, "get_delta_weight")]
    compared = 0
    for layer in layers:
        if "exact" not in layer.lora_A:
            continue
        exact, whole, low = (layer.get_delta_weight(name) for name in ("exact", "whole", "low"))
        torch.testing.assert_close(whole, exact, atol=1e-5, rtol=1e-4)
        values = torch.linalg.svdvals(exact)
        assert torch.linalg.matrix_rank(low, rtol=1e-4) <= 1
        torch.testing.assert_close((exact - low).norm(), values[1:].norm(), atol=1e-5, rtol=1e-3)  # Eckart and Young
        compared += 1
    assert compared


def test_a_rank_above_the_smallest_layer_s_can_be_merged_to(tmp_path: Path) -> None:
    """The head has seven outputs, the projector of proprioception eight inputs."""
    policy = tiny_policy()
    batch = policy.collator(policy.dataset.__getitems__([0, 1]))
    model: Any = policy.model
    for name in ("one", "two"):
        model = add_adapter(model, name, config(tmp_path, lora_r=10, lora_alpha=8))
        for _, parameter in adapter_parameters(model, name):
            torch.nn.init.normal_(parameter, 0, 0.1)
    answers = {}
    for rank in (0, 12, 20):
        merge_adapters(model, ["one", "two"], f"rank_{rank}", weight=0.5, rank=rank)
        with torch.inference_mode():
            answers[rank] = model(**batch).predicted_actions
    torch.testing.assert_close(answers[20], answers[0], atol=1e-4, rtol=1e-3)
    assert answers[12].isfinite().all()
    assert not torch.allclose(answers[12], answers[0], atol=1e-4)


@pytest.mark.parametrize(
    ("method", "expected"),
    [("ewc", "continue"), ("single_task", "fresh"), ("merge", "fresh"), ("er", "continue")],
)
def test_methods_that_say_where_an_adapter_starts(tmp_path: Path, method: str, expected: str) -> None:
    assert config(tmp_path, method=method).adapter_init == expected


@pytest.mark.parametrize("mode", ["infonce", "relational", "paper"])
def test_cmi_uses_the_temperature_that_is_configured(tmp_path: Path, anchors: Anchors, mode: Any) -> None:
    (cmi,) = make_terms(config(tmp_path, lambda_output=0.0, lambda_rac=0.0, cmi_mode=mode, temperature=0.3))
    student, chosen = features(3, seed=3), contrast(anchors, pairs((0, 0), (1, 5), (0, 12)), pairs((1, 17)))
    across = {"bank": anchors.fused[1, 17][None], "exclude": chosen.exclude} if mode != "paper" else {}
    expected = cross_modal_mi_from_summaries(
        summarize_cross_modal(student.vision, student.language, temperature=0.3),
        anchors.summary(chosen.own, WORDS),
        mode=mode,
        temperature=0.3,
        joint_network=cmi.network,  # type: ignore[arg-type]
        **across,  # type: ignore[arg-type]
    )
    torch.testing.assert_close(cmi(student, chosen), expected)


def test_the_bank_depends_on_the_seed() -> None:
    chosen = [Negatives(TRAJECTORY, FRAME, bank_size=8, window=2, seed=seed)._chosen for seed in (0, 1)]
    assert not torch.equal(*chosen)


def test_online_ewc_refers_to_the_latest_weights(tmp_path: Path) -> None:
    policy, model = moved_adapter(tmp_path)
    data = policy.dataset.like(policy.task("open_the_drawer"))
    first = Consolidation.measure(model, "one", data, policy.collator, samples=2, seed=0)
    with torch.no_grad():
        for _, parameter in adapter_parameters(model, "one"):
            parameter.add_(0.3)
    later = Consolidation.measure(model, "one", data, policy.collator, samples=2, seed=0, before=first)
    assert later.penalty(model, "one") == 0
    assert first.penalty(model, "one") > 0


@pytest.mark.parametrize("what", ["fisher", "interference"])
def test_dropout_has_no_part_in_what_is_measured(tmp_path: Path, what: str) -> None:
    policy, model = moved_adapter(tmp_path, lora_dropout=0.5)
    data = policy.dataset.like(policy.task("open_the_drawer"))
    model.train()
    flags = [module.training for module in model.modules()]
    if what == "fisher":
        one, two = (
            Consolidation.measure(model, "one", data, policy.collator, samples=2, seed=0).fisher for _ in range(2)
        )
        assert all(torch.equal(one[name], two[name]) for name in one)
        model.train()
    else:
        current, offered = (policy.collator(data.__getitems__(rows)) for rows in ([0, 1], [2, 3, 4, 5, 6, 7]))
        scores = []
        for _ in range(2):
            torch.manual_seed(0)  # of the step's own dropout
            scores.append(interference(model, current, offered, 1e-2))
            torch.rand(7)
        assert torch.equal(*scores)
        torch.manual_seed(0)
        assert float(interference(model, current, offered, 1e-9).abs().max()) < 1e-6
    assert [module.training for module in model.modules()] == flags

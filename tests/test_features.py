"""Features by role, out of the one forward pass."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_policy import TinyPolicy, tiny_policy

from infovla_peft.features import FeatureTap, extract_features


@pytest.fixture(scope="module")
def policy() -> TinyPolicy:
    return tiny_policy()


@pytest.mark.parametrize("layer", [-1, -2, 1])
def test_the_tap_gives_the_hidden_state_of_its_layer(policy: TinyPolicy, layer: int) -> None:
    batch = policy.batch([0, 30, 60])
    with FeatureTap(policy.model, layer) as tap:
        output = policy.model(**batch, output_hidden_states=True)
    assert torch.equal(tap.hidden, output.hidden_states[layer])
    assert tap._keep not in policy.model.tap_module(layer)._forward_hooks.values()


def test_features_by_role_equal_a_loop_over_positions(policy: TinyPolicy) -> None:
    batch = policy.batch([0, 30, 60])  # three instructions of different length
    with FeatureTap(policy.model, -1) as tap:
        roles = policy.model(**batch).token_roles
    features = extract_features(tap.hidden, roles)
    prompts = batch["attention_mask"].sum(1)
    assert features.language_mask.sum(1).tolist() == (prompts - 2).tolist()  # without BOS and the last, which predicts
    for row, hidden in enumerate(tap.hidden):
        torch.testing.assert_close(features.action[row], hidden[roles.action[row]].mean(0))
        assert torch.equal(features.vision[row], hidden[roles.vision[row]])
        words = features.language[row][features.language_mask[row]]
        assert torch.equal(words, hidden[roles.language[row]])
        assert not features.language[row][~features.language_mask[row]].any()


def test_rac_may_contrast_the_last_token_of_the_prompt_or_the_patches(policy: TinyPolicy) -> None:
    with FeatureTap(policy.model, -1) as tap:
        roles = policy.model(**policy.batch([0, 30, 60])).token_roles
    prompt = extract_features(tap.hidden, roles, slice(1, None), pooling="prompt")
    vision = extract_features(tap.hidden, replace(roles, vision_span=None), pooling="vision")
    for row in (0, 1):
        last = roles.language[1 + row].nonzero()[-1, 0]
        torch.testing.assert_close(prompt.action[row], tap.hidden[1 + row, last])
    for row, hidden in enumerate(tap.hidden):
        torch.testing.assert_close(vision.action[row], hidden[roles.vision[row]].mean(0))
    assert torch.equal(prompt.language, extract_features(tap.hidden, roles, slice(1, None)).language)


def test_only_some_rows(policy: TinyPolicy) -> None:
    batch = policy.batch([0, 30, 60, 1])
    with FeatureTap(policy.model, -1) as tap:
        roles = policy.model(**batch).token_roles
    every, some = extract_features(tap.hidden, roles), extract_features(tap.hidden, roles, slice(2, None))
    longest = some.language.shape[1]
    torch.testing.assert_close(some.action, every.action[2:])
    assert torch.equal(some.vision, every.vision[2:])
    assert torch.equal(some.language, every.language[2:, :longest])
    none = extract_features(tap.hidden, roles, slice(4, None))
    assert (len(none.action), len(none.vision), len(none.language)) == (0, 0, 0)


def test_known_positions_give_what_the_masks_give(policy: TinyPolicy) -> None:
    with FeatureTap(policy.model, -1) as tap:
        roles = policy.model(**policy.batch([0, 30, 60, 1])).token_roles
    assert roles.vision_span == (1, 5)
    words = int(roles.language.sum(1).max())
    known = extract_features(tap.hidden, roles, longest=words)
    asked = extract_features(tap.hidden, replace(roles, vision_span=None))
    assert all(torch.equal(one, other) for one, other in zip(known[:4], asked[:4], strict=True))  # type: ignore[arg-type]


def test_a_layer_that_did_not_run(policy: TinyPolicy) -> None:
    with FeatureTap(policy.model, -1) as tap, pytest.raises(RuntimeError, match="did not run"):
        _ = tap.hidden


def test_padding_does_not_change_the_features(policy: TinyPolicy) -> None:
    def features(rows: list[int]) -> tuple[np.ndarray, ...]:
        policy.model.eval()
        with torch.no_grad(), FeatureTap(policy.model, -1) as tap:
            roles = policy.model(**policy.batch(rows)).token_roles
        found = extract_features(tap.hidden, roles)
        return found.action[0].numpy(), found.vision[0].numpy(), found.language[0][found.language_mask[0]].numpy()

    for alone, together in zip(features([0]), features([0, 60]), strict=True):
        np.testing.assert_allclose(alone, together, atol=1e-5)

"""OpenVLA's forward pass and prediction on tiny random models."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from infovla_peft.models.openvla import (
    OpenVLAConfig,
    OpenVLAForActionPrediction,
    assert_policy_sees_image,
    build_prompt,
    build_tiny_openvla,
)
from infovla_peft.policy import VLAModel

INSTRUCTIONS = ["open the drawer", "put the bowl on the stove", "turn it on"]
SMALL: dict[str, Any] = {
    "instructions": INSTRUCTIONS,
    "image_size": 32,
    "vision_width": 32,
    "vision_depth": 3,
    "hidden_size": 32,
    "layers": 2,
    "heads": 2,
    "chunk": 3,
}


def tiny(**changes: Any) -> tuple[OpenVLAForActionPrediction, Any]:
    """A tiny model; fields of its configuration may be changed beyond what the builder offers."""
    fields = {name: changes.pop(name) for name in list(changes) if hasattr(OpenVLAConfig, name)}
    model, processor = build_tiny_openvla(**SMALL | changes)
    if fields:
        torch.manual_seed(0)
        model = OpenVLAForActionPrediction(OpenVLAConfig.from_dict(model.config.to_dict() | fields))
    return model.eval(), processor


def batch(
    model: OpenVLAForActionPrediction, processor: Any, instructions: list[str] = INSTRUCTIONS
) -> dict[str, Tensor]:
    generator = np.random.default_rng(0)
    config = model.config
    images = generator.integers(0, 256, (len(instructions), config.num_images_in_input, 32, 32, 3), dtype=np.uint8)
    inputs = dict(
        processor([build_prompt(text) for text in instructions], [list(row) for row in images], padding=True)
    )
    if config.proprio_dim:
        inputs["proprio"] = torch.from_numpy(generator.uniform(-1, 1, (len(instructions), config.proprio_dim))).float()
    if config.decoding == "parallel":
        shape = (len(instructions), config.num_actions_chunk, config.action_dim)
        inputs["actions"] = torch.from_numpy(generator.uniform(-1, 1, shape)).float()
    return inputs


def row(inputs: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    """One sample without padding."""
    length = int(inputs["attention_mask"][index].sum())
    cut = {name: inputs[name][index : index + 1, :length] for name in ("input_ids", "attention_mask")}
    return {name: value[index : index + 1] for name, value in inputs.items()} | cut


VARIANTS = [
    {},
    {"proprio_dim": 0},
    {"num_images": 2},
    {"fused": True, "num_images": 2},
    {"use_film": True},
    {"action_head": "discrete"},
    {"empty_token_id": 5},
]
AUTOREGRESSIVE: dict[str, Any] = {"decoding": "autoregressive", "action_head": "discrete", "proprio_dim": 0}


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_a_batch_equals_its_samples(changes: dict[str, Any]) -> None:
    model, processor = tiny(**changes)
    inputs = batch(model, processor)
    with torch.no_grad():
        together = model(**inputs).predicted_actions
        alone = torch.cat([model(**row(inputs, index)).predicted_actions for index in range(3)])
    assert together.shape == (3, 3, 7)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_autoregressive_prediction_of_a_batch_equals_its_samples_and_needs_no_cache() -> None:
    model, processor = tiny(**AUTOREGRESSIVE)
    inputs = batch(model, processor)
    together = model.predict_action(**inputs)
    assert together.shape == (3, 7)
    with pytest.raises(ValueError, match="`proprio` needs a model with `decoding='parallel'`"):
        model.predict_action(**inputs, proprio=np.zeros((3, 8)))
    first = model.config.action_token_begin_id + 1
    for index in range(3):
        sample = row(inputs, index)
        np.testing.assert_array_equal(model.predict_action(**sample), together[index])
        ids = sample["input_ids"]
        for _ in range(7):  # the whole sequence anew for each token
            with torch.no_grad():
                logits = model(ids, pixel_values=sample["pixel_values"]).logits
            ids = torch.cat([ids, logits[:, -1:, first : first + 256].argmax(-1) + first], dim=1)
        np.testing.assert_allclose(model.bins.decode(ids[0, -7:].numpy()), together[index], atol=1e-12)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("rows", [1, 3], ids=["alone", "padded"])
def test_lean_steps_are_the_decoders_own_bit_for_bit(attention: str, rows: int) -> None:
    model, processor = tiny(**AUTOREGRESSIVE)
    model.language_model.model.set_attn_implementation(attention)
    inputs = batch(model, processor)
    inputs = row(inputs, 0) if rows == 1 else inputs
    heads: list[Tensor] = []
    model.language_model.model.norm.register_forward_hook(lambda _, __, output: heads.append(output[:, -1]))
    lean = model.predict_action(**inputs)
    steps, heads[:] = list(heads), []
    calls: list[object] = []
    model.language_model.model.register_forward_hook(lambda *_: calls.append(None))  # a hook forbids going around it
    np.testing.assert_array_equal(model.predict_action(**inputs), lean)
    assert len(calls) == len(steps) == 7
    assert all(torch.equal(one, other) for one, other in zip(steps, heads, strict=True))


@pytest.mark.parametrize("do_sample", [False, True])
def test_only_action_tokens_are_chosen_whatever_the_head(do_sample: bool) -> None:
    model, processor = tiny(**AUTOREGRESSIVE)
    inputs = batch(model, processor)
    first = model.config.action_token_begin_id + 1
    with torch.no_grad():
        model.language_model.lm_head.weight[7] *= 100  # a word that is likelier than any action, or far less likely
        model.language_model.lm_head.weight[8] = -model.language_model.lm_head.weight[7]

    def decode() -> Tensor:
        torch.manual_seed(0)
        return model._decode_tokens(
            inputs["input_ids"], inputs["attention_mask"], inputs["pixel_values"], 7, do_sample
        )

    ids = decode()
    assert ids.shape == (3, 7)
    assert bool((ids >= first).all())
    assert bool((ids < first + 256).all())
    head = model.language_model.lm_head
    head.register_forward_hook(lambda *_: None)  # whole, as with an adapter on it
    assert torch.equal(decode(), ids)


def test_cached_forward_continues_a_sequence() -> None:
    model, processor = tiny(**AUTOREGRESSIVE)
    sample = row(batch(model, processor), 0)
    token = torch.tensor([[7]])
    with torch.no_grad():
        cache = model(**sample, use_cache=True).past_key_values
        continued = model(token, past_key_values=cache, use_cache=True).logits
        whole = model(torch.cat([sample["input_ids"], token], 1), pixel_values=sample["pixel_values"]).logits
    torch.testing.assert_close(continued[:, -1], whole[:, -1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head", ["l1", "discrete"])
def test_prompts_and_whole_training_sequences_give_the_same(head: str) -> None:
    model, processor = tiny(action_head=head)
    inputs = batch(model, processor)
    ids = model.bins.encode_tensor(inputs["actions"].flatten(1))
    lengths = inputs["attention_mask"].sum(1)
    rows = [torch.cat([inputs["input_ids"][i, :n], ids[i], torch.tensor([2])]) for i, n in enumerate(lengths)]
    full = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=model.config.pad_token_id)
    labels = full.masked_fill(
        (torch.arange(full.shape[1]) < lengths[:, None]) | (full == model.config.pad_token_id), -100
    )
    mask = (full != model.config.pad_token_id).long()
    short = model(**inputs)
    long = model(**inputs | {"input_ids": full, "attention_mask": mask, "labels": labels})
    torch.testing.assert_close(long.loss, short.loss)
    torch.testing.assert_close(long.predicted_actions, short.predicted_actions)
    for name in ("vision", "language", "action", "proprio"):
        assert torch.equal(getattr(long.token_roles, name), getattr(short.token_roles, name)), name
    assert long.logits.shape == (*long.token_roles.action.shape, model.config.text_config.vocab_size)


@pytest.mark.parametrize(
    "changes", [{}, {"action_head": "discrete"}, AUTOREGRESSIVE], ids=["l1", "discrete", "autoregressive"]
)
def test_nobody_computes_logits_in_vain(changes: dict[str, Any]) -> None:
    model, processor = tiny(**changes)
    inputs = batch(model, processor)
    inputs.pop("actions", None)
    calls: list[int] = []
    model.language_model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    output = model(**inputs, return_logits=False)
    assert output.logits is None
    assert not calls
    default = model(**inputs)
    assert (default.logits is None) == (not changes)
    assert model(**inputs, return_logits=True).logits is not None


def test_l1_loss_is_the_mean_absolute_error() -> None:
    model, processor = tiny()
    inputs = batch(model, processor)
    output = model(**inputs)
    torch.testing.assert_close(output.loss, (output.predicted_actions - inputs["actions"]).abs().mean())
    assert output.logits is None
    assert model(**inputs, return_dict=False)[0] == output.loss


def test_discrete_loss_is_the_cross_entropy_of_action_and_stop_tokens() -> None:
    model, processor = tiny(action_head="discrete")
    inputs = batch(model, processor)
    output = model(**inputs)
    targets = torch.cat([model.bins.encode_tensor(inputs["actions"].flatten(1)), torch.full((3, 1), 2)], 1)
    losses = [
        F.cross_entropy(row[k], target[k])
        for row, target in zip(output.logits, targets, strict=True)
        for k in range(22)
    ]
    torch.testing.assert_close(output.loss, torch.stack(losses).mean())
    best = model.bins.decode(output.logits[:, :-1].argmax(-1).numpy()).reshape(3, 3, 7)
    np.testing.assert_allclose(output.predicted_actions.numpy(), best, atol=1e-7)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_roles_partition_the_sequence(changes: dict[str, Any]) -> None:
    model, processor = tiny(**changes)
    inputs = batch(model, processor)
    config = model.config
    roles = model(**inputs).token_roles
    masks = torch.stack([roles.vision, roles.language, roles.action, roles.proprio])
    assert masks.dtype == torch.bool
    assert int(masks.sum(0).max()) == 1
    patches = 4 * config.num_images_in_input
    lengths = inputs["attention_mask"].sum(1)
    assert roles.vision.sum(1).tolist() == [patches] * 3
    assert roles.action.sum(1).tolist() == [21] * 3
    assert roles.proprio.sum(1).tolist() == [int(config.proprio_dim > 0)] * 3
    # BOS has no role; the last prompt token predicts the first action, unless '▁' follows it.
    assert roles.language.sum(1).tolist() == (lengths - (1 if config.empty_token_id else 2)).tolist()


def test_roles_of_autoregressive_sequences() -> None:
    model, processor = tiny(**AUTOREGRESSIVE)
    inputs = batch(model, processor, INSTRUCTIONS[:1])
    length = inputs["input_ids"].shape[1]
    prompt = model(**inputs).token_roles
    assert prompt.action.nonzero().tolist() == [[0, length + 3]]
    answer = torch.tensor([[767, 700, 650, 600, 590, 580, 570, 2]])
    ids = torch.cat([inputs["input_ids"], answer], 1)
    labels = torch.cat([torch.full_like(inputs["input_ids"], -100), answer], 1)
    roles = model(ids, pixel_values=inputs["pixel_values"], labels=labels).token_roles
    assert roles.action.nonzero()[:, 1].tolist() == list(range(length + 3, length + 10))
    assert roles.language.nonzero()[:, 1].tolist() == list(range(5, length + 3))
    assert roles.vision.nonzero()[:, 1].tolist() == [1, 2, 3, 4]


def test_every_position_sees_every_other_with_parallel_decoding() -> None:
    model, processor = tiny()
    inputs = batch(model, processor, INSTRUCTIONS[:1])
    embeddings = torch.zeros(1, 1, 1)

    def keep(_module: Any, _inputs: Any, output: Tensor) -> None:
        nonlocal embeddings
        embeddings = output.requires_grad_() if not output.requires_grad else output
        embeddings.retain_grad()

    handle = model.get_input_embeddings().register_forward_hook(keep)
    hidden = model(**inputs, output_hidden_states=True).hidden_states[-1]
    handle.remove()
    hidden[0, 1].sum().backward()  # the first patch depends on the stop token after it …
    gradient = embeddings.grad[0]
    assert gradient[-1].abs().sum() > 0
    assert gradient[-2].abs().sum() == 0  # … and on no embedding of an empty action slot


@pytest.mark.parametrize("layer", [1, 2, -1, -2])
def test_tapped_module_gives_the_hidden_state(layer: int) -> None:
    model, processor = tiny()
    assert isinstance(model, VLAModel)
    tapped: list[Tensor] = []
    handle = model.tap_module(layer).register_forward_hook(lambda _m, _i, output: tapped.append(output))
    with torch.no_grad():
        hidden = model(**batch(model, processor), output_hidden_states=True).hidden_states
    handle.remove()
    assert torch.equal(tapped[0], hidden[layer])
    for wrong in (0, 3, -3):
        with pytest.raises(ValueError, match="cannot be tapped"):
            model.tap_module(wrong)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("changes", [{}, AUTOREGRESSIVE], ids=["parallel", "autoregressive"])
def test_attention_implementations_agree(implementation: str, changes: dict[str, Any]) -> None:
    model, processor = tiny(**changes)
    inputs = batch(model, processor)
    with torch.no_grad():
        expected = model(**inputs, output_hidden_states=True).hidden_states[-1]
        model.set_attn_implementation(implementation)
        got = model(**inputs, output_hidden_states=True)
    roles = got.token_roles
    used = roles.vision | roles.language | roles.action
    torch.testing.assert_close(got.hidden_states[-1][used], expected[used], rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    model, processor = tiny(use_film=True)
    model.train()
    model.vision_backbone.featurizer.patch_embed.requires_grad_(False)
    model.vision_backbone.featurizer.pos_embed.requires_grad_(False)
    inputs = batch(model, processor)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        model(**inputs).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert any("vision_backbone.featurizer.blocks.0.scale" in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-7)


def test_frozen_vision_runs_without_autograd() -> None:
    model, processor = tiny(fused=True)
    inputs = batch(model, processor)
    assert model.vision_backbone(inputs["pixel_values"]).requires_grad
    model.vision_backbone.requires_grad_(False)
    model.vision_backbone.fused_featurizer.blocks[0].mlp.fc1.weight.requires_grad_(True)  # an adapter, say
    assert not model.vision_backbone.featurizer(inputs["pixel_values"][:, :3]).requires_grad
    assert model.vision_backbone(inputs["pixel_values"]).requires_grad


@pytest.mark.parametrize("changes", [{}, AUTOREGRESSIVE], ids=["parallel", "autoregressive"])
def test_bf16(changes: dict[str, Any]) -> None:
    model, processor = tiny(**changes)
    inputs = batch(model, processor)
    if changes:
        inputs["labels"] = inputs["input_ids"]
    exact = model(**inputs).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**inputs).loss
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.05)
    loss.backward()
    assert model.projector.fc1.weight.grad.isfinite().all()
    assert model.bfloat16()(**inputs).loss.item() == pytest.approx(exact.item(), rel=0.05)


def test_the_loss_halves_on_one_batch() -> None:
    model, processor = tiny()
    inputs = batch(model.train(), processor)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize(
    "changes", [{}, {"fused": True, "num_images": 2}, {"action_head": "discrete"}, AUTOREGRESSIVE], ids=str
)
def test_policy_sees_its_image(changes: dict[str, Any]) -> None:
    model, processor = tiny(**changes)
    assert_policy_sees_image(model, processor)
    blind = model.projector.fc3 or model.projector.fc2
    blind.weight.data.zero_()
    with pytest.raises(RuntimeError, match="does not see its image"):
        assert_policy_sees_image(model, processor)


def test_film_modulates_by_the_mean_of_the_instruction() -> None:
    model, processor = tiny(use_film=True)
    inputs = row(batch(model, processor), 1)
    vit = model.vision_backbone.featurizer
    embed = model.get_input_embeddings()
    with torch.no_grad():
        language = embed(torch.cat([inputs["input_ids"], torch.tensor([[2]])], 1)).mean(1)
        x = vit.patch_embed(inputs["pixel_values"]) + vit.pos_embed
        for block in vit.blocks[:-1]:
            x = x + block.attn(block.norm1(x))
            x = x * (1 + block.scale(language)) + block.shift(language)
            x = x + block.mlp(block.norm2(x))
        torch.testing.assert_close(model(**inputs).projector_features, model.projector(x))


def test_unnormalised_actions() -> None:
    statistics = {"q01": [-1.0, 0.0], "q99": [1.0, 4.0], "min": [-2.0, 0.0], "max": [2.0, 8.0], "mask": [True, False]}
    model, processor = tiny(action_dim=2, norm_stats={"goal_no_noops": {"action": statistics}})
    inputs = batch(model, processor)
    predicted = model(**inputs).predicted_actions.detach().numpy()
    inputs.pop("actions")
    for normalization, span in (("bounds_q99", 2.0), ("bounds", 4.0)):
        model.config.action_normalization = normalization
        actions = model.predict_action(**inputs, unnorm_key="goal")
        np.testing.assert_allclose(
            actions[..., 0], 0.5 * (predicted[..., 0] + 1) * (span + 1e-8) - span / 2, atol=1e-6
        )
        np.testing.assert_allclose(actions[..., 1], predicted[..., 1], atol=1e-6)
    assert model.predict_action(**row(inputs, 0)).shape == (3, 2)
    assert model.get_action_dim() == 2
    with pytest.raises(ValueError, match="'spatial'` is unknown; the model knows: goal_no_noops"):
        model.predict_action(**inputs, unnorm_key="spatial")
    model.config.norm_stats = None
    with pytest.raises(ValueError, match="save `dataset_statistics"):
        model.predict_action(**inputs)


def test_sampling_follows_the_distribution() -> None:
    model, processor = tiny(**AUTOREGRESSIVE)
    inputs = batch(model, processor)
    torch.manual_seed(0)
    cold = model.predict_action(**inputs, do_sample=True, temperature=1e-4)
    np.testing.assert_array_equal(cold, model.predict_action(**inputs))
    assert (model.predict_action(**inputs, do_sample=True, temperature=5.0) != cold).any()
    np.testing.assert_array_equal(cold, model.predict_action(**inputs, do_sample=True, temperature=0))
    for temperature in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="`temperature` must be at least 0, and finite"):
            model.predict_action(**inputs, do_sample=True, temperature=temperature)


@pytest.mark.parametrize("head", ["l1", "discrete"])
def test_chunks_of_another_length_are_refused(head: str) -> None:
    """One action would be broadcast over the chunk, and learned."""
    model, processor = tiny(action_head=head)
    inputs = batch(model, processor)
    inputs["actions"] = inputs["actions"][:, :1]
    with pytest.raises(ValueError, match=r"`actions` must be \(batch, 3, 7\), got \(\d, 1, 7\)"):
        model(**inputs)


def test_bad_inputs_name_the_problem() -> None:
    model, processor = tiny()
    inputs = batch(model, processor)
    with pytest.raises(ValueError, match="needs `proprio`"):
        model(**inputs | {"proprio": None})
    with pytest.raises(ValueError, match="3 numbers per sample, not 8"):
        model(**inputs | {"proprio": torch.zeros(3, 3)})
    with pytest.raises(ValueError, match="6 channels, but 1 image"):
        model(**inputs | {"pixel_values": torch.zeros(3, 6, 32, 32)})
    for size in ((20, 20), (40, 40), (64, 64), (32, 40), (32,)):
        with pytest.raises(ValueError, match=r"shape \(batch, 3, 32, 32\), got .*let the model's processor resize"):
            model(**inputs | {"pixel_values": torch.zeros(3, 3, *size)})
    with pytest.raises(ValueError, match="got 2 and 3"):
        model(**inputs | {"pixel_values": torch.zeros(2, 3, 32, 32)})
    with pytest.raises(ValueError, match="padding on the right"):
        model(**inputs | {"attention_mask": inputs["attention_mask"].flip(1)})
    with pytest.raises(ValueError, match="must hold 21 action tokens"):
        model(**inputs, labels=inputs["input_ids"])
    with pytest.raises(ValueError, match="`decoding='parallel'`"):
        tiny(**AUTOREGRESSIVE)[0](**inputs)
    with pytest.raises(ValueError, match="needs `pixel_values`"):
        model(inputs["input_ids"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"decoding": "diffusion"}, "choose one of autoregressive, parallel"),
        ({"decoding": "autoregressive"}, "`action_head='l1'` needs"),
        ({"action_head": "l2"}, "choose one of discrete, l1"),
        ({"vision_backbone_id": "resnet"}, "dinosiglip-vit-so-224px"),
        ({"llm_backbone_id": "gpt"}, "llama2-7b-pure"),
        ({"num_images_in_input": 0}, "at least 1"),
        ({"use_fused_vision_backbone": True}, "needs 2 entries"),
        ({"action_normalization": "mean"}, "bounds_q99"),
    ],
)
def test_bad_configurations_name_the_problem(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**fields)


def test_builder_is_deterministic_and_leaves_the_random_state() -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    first, second = tiny()[0], tiny(seed=1)[0]
    assert torch.equal(torch.rand(3), expected)
    again = tiny()[0]
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.projector.fc1.weight, second.projector.fc1.weight)

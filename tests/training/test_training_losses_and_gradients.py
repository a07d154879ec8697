"""Labels, the load-balancing loss, gradients, and gradient checkpointing."""

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache

from modeling_grok1 import (
    Grok1ForCausalLM,
    Grok1ForQuestionAnswering,
    Grok1ForSequenceClassification,
    Grok1ForTokenClassification,
)
from modeling_grok1.modeling_grok1 import Grok1SparseMoeBlock, Grok1TopKRouter


@pytest.fixture
def model(small_config):
    torch.manual_seed(0)
    small_config.initializer_range = 0.2  # routers that prefer some experts
    return Grok1ForCausalLM(small_config)


@pytest.fixture
def batch():
    tokens = torch.randint(3, 96, (3, 14), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[0, 9:], mask[1, :4] = 0, 0
    return {"input_ids": tokens, "attention_mask": mask}


def test_labels_give_the_mean_cross_entropy_of_the_next_token(model, batch):
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    output = model(**batch, labels=labels)
    labels[1, 4] = -100  # after the padding of row 1
    logits = output.logits[:, :-1].reshape(-1, 96)
    expected = F.cross_entropy(logits, labels[:, 1:].reshape(-1), ignore_index=-100)
    torch.testing.assert_close(output.loss, expected)
    assert output.aux_loss is None
    assert output.router_logits is None

    # Gradient accumulation: the Trainer divides by the tokens of all its batches.
    by_items = model(**batch, labels=labels, num_items_in_batch=torch.tensor(100)).loss
    torch.testing.assert_close(by_items, F.cross_entropy(logits, labels[:, 1:].reshape(-1), reduction="sum") / 100)


def balance_loss(router_inputs, model, mask):
    """Switch Transformer, equations 4 to 6, over the tokens of all layers, with top_k choices a token."""
    real = mask.reshape(-1).bool()
    fractions, probabilities = torch.zeros(8), torch.zeros(8)
    for x, layer in zip(router_inputs, model.model.layers, strict=True):
        gates = (x.reshape(-1, 32) @ layer.block_sparse_moe.gate.weight.T).softmax(-1)[real]
        for expert in range(8):
            chosen = (gates.topk(2).indices == expert).any(-1)
            fractions[expert] += chosen.float().mean() / len(router_inputs)
            probabilities[expert] += gates[:, expert].mean() / len(router_inputs)
    return 8 * (fractions * probabilities).sum()


@pytest.fixture
def router_inputs(model):
    inputs = []
    for module in model.modules():
        if isinstance(module, Grok1SparseMoeBlock):
            module.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    return inputs


@pytest.mark.parametrize("masked", [True, False])
def test_the_load_balancing_loss_is_over_the_routers_logits_of_real_tokens(model, batch, router_inputs, masked):
    if not masked:
        batch.pop("attention_mask")
    labels = batch["input_ids"]
    output = model(**batch, labels=labels, output_router_logits=True)
    mask = batch.get("attention_mask", torch.ones_like(labels))
    expected = balance_loss(router_inputs, model, mask)
    torch.testing.assert_close(output.aux_loss, expected)
    assert abs(expected - balance_loss(router_inputs, model, torch.ones_like(mask))) > (1e-3 if masked else -1)
    assert expected > 2.05  # 2 when all is balanced

    assert len(output.router_logits) == 2
    for logits, x, layer in zip(output.router_logits, router_inputs, model.model.layers, strict=True):
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, x.reshape(-1, 32) @ layer.block_sparse_moe.gate.weight.T)

    plain = model(**batch, labels=labels).loss
    torch.testing.assert_close(output.loss, plain + 0.001 * expected)


def test_the_config_asks_for_the_balance_too_and_the_coefficient_counts(model, batch):
    asked = model(**batch, labels=batch["input_ids"], output_router_logits=True)
    model.config.output_router_logits, model.config.router_aux_loss_coef = True, 0.5
    output = model(**batch, labels=batch["input_ids"])
    torch.testing.assert_close(output.aux_loss, asked.aux_loss)
    torch.testing.assert_close(output.loss, asked.loss + (0.5 - 0.001) * asked.aux_loss)
    without_labels = model(**batch)
    assert without_labels.loss is None
    torch.testing.assert_close(without_labels.aux_loss, asked.aux_loss)


def gradients(model, batch, **options):
    model.zero_grad()
    output = model(**batch, labels=batch["input_ids"], use_cache=False, **options)
    output.loss.backward()
    return output, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("layout", ["fused", "linear"])
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("router_logits", [False, True])
def test_gradient_checkpointing_changes_no_gradient(small_config, batch, layout, use_reentrant, router_logits):
    torch.manual_seed(0)
    small_config.initializer_range = 0.2
    model = Grok1ForCausalLM(small_config, experts_layout=layout).train()
    calls = []
    for module in model.modules():
        if isinstance(module, Grok1TopKRouter):
            module.register_forward_pre_hook(lambda *_: calls.append(1))
    plain, expected = gradients(model, batch, output_router_logits=router_logits)
    assert len(calls) == small_config.num_hidden_layers

    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    assert model.is_activation_checkpointing
    calls.clear()
    if router_logits and use_reentrant:
        # Reentrant checkpoints, which are not the default, detach what is recorded, in every model of Transformers.
        with pytest.raises(ValueError, match=r"no gradient: leave `use_reentrant=True` out"):
            gradients(model, batch, output_router_logits=True)
        return
    output, actual = gradients(model, batch, output_router_logits=router_logits)
    assert len(calls) == 2 * small_config.num_hidden_layers  # each layer was computed again
    torch.testing.assert_close(output.loss, plain.loss)
    if router_logits:
        assert len(output.router_logits) == small_config.num_hidden_layers
        torch.testing.assert_close(output.aux_loss, plain.aux_loss)
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm", "linear"])
def test_every_parameter_gets_the_same_gradient_from_every_experts_implementation(small_config, batch, experts):
    def build(**options):
        torch.manual_seed(0)
        small_config.initializer_range = 0.2
        return Grok1ForCausalLM(small_config, **options).train()

    reference = build()
    reference.set_experts_implementation("eager")
    _, expected = gradients(reference, batch)
    assert all(gradient.abs().max() > 0 for gradient in expected.values())

    if experts != "linear":
        model = build()
        model.set_experts_implementation(experts)
        _, actual = gradients(model, batch)
    else:
        model = build(experts_layout="linear")
        state = reference.state_dict()
        for i in range(small_config.num_hidden_layers):
            prefix = f"model.layers.{i}.block_sparse_moe.experts."
            up, down = state.pop(f"{prefix}gate_up_proj"), state.pop(f"{prefix}down_proj")
            for e in range(8):
                w1, w3 = up[e].chunk(2)
                state |= {
                    f"{prefix}{e}.w1.weight": w1,
                    f"{prefix}{e}.w3.weight": w3,
                    f"{prefix}{e}.w2.weight": down[e],
                }
        model.load_state_dict(state)
        _, apart = gradients(model, batch)
        actual = {name: gradient for name, gradient in apart.items() if ".experts." not in name}
        for i in range(small_config.num_hidden_layers):
            prefix = f"model.layers.{i}.block_sparse_moe.experts."
            rows = [torch.cat([apart[f"{prefix}{e}.{w}.weight"] for w in ("w1", "w3")]) for e in range(8)]
            actual[f"{prefix}gate_up_proj"] = torch.stack(rows)
            actual[f"{prefix}down_proj"] = torch.stack([apart[f"{prefix}{e}.w2.weight"] for e in range(8)])
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_a_few_steps_lower_the_loss(model, batch):
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(15):
        loss = model(**batch, labels=batch["input_ids"], output_router_logits=True).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_the_classification_heads_learn(small_config, batch):
    torch.manual_seed(0)
    small_config.num_labels = 3
    cases = {
        Grok1ForSequenceClassification: {"labels": torch.tensor([0, 2, 1])},
        Grok1ForTokenClassification: {"labels": batch["input_ids"] % 3},
        Grok1ForQuestionAnswering: {
            "start_positions": torch.tensor([1, 5, 2]),
            "end_positions": torch.tensor([3, 8, 2]),
        },
    }
    for model_class, targets in cases.items():
        for layout in ("fused", "linear"):
            model = model_class(small_config, experts_layout=layout).train()
            loss = model(**batch, **targets).loss
            loss.backward()
            assert loss.isfinite()
            assert loss > 0
            assert all(p.grad is not None for name, p in model.named_parameters() if ".experts." not in name)


def test_sequence_classification_reads_the_last_real_token(small_config):
    torch.manual_seed(0)
    model = Grok1ForSequenceClassification(small_config).eval()
    tokens = torch.tensor([[5, 6, 7, 0, 0]])
    with torch.no_grad():
        padded = model(tokens, attention_mask=(tokens != 0).long()).logits
        torch.testing.assert_close(padded, model(tokens[:, :3]).logits)


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
def test_a_model_that_was_trained_with_the_balance_loss_generates(model, batch, options):
    """TRL leaves `output_router_logits` on."""
    greedy = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
    model.eval()
    expected = model.generate(**batch, **greedy)
    model.config.output_router_logits = True
    assert model.generate(**batch, **greedy).tolist() == expected.tolist()


@torch.no_grad()
def test_the_balance_of_a_step_with_a_cache_is_that_of_its_tokens(model, batch, router_inputs):
    """The mask is longer than the tokens there."""
    tokens, mask = batch["input_ids"], batch["attention_mask"]
    cache = DynamicCache(config=model.config)
    model(tokens[:, :6], attention_mask=mask[:, :6], past_key_values=cache)
    router_inputs.clear()
    output = model(tokens[:, 6:], attention_mask=mask, past_key_values=cache, output_router_logits=True)
    torch.testing.assert_close(output.aux_loss, balance_loss(router_inputs, model, mask[:, 6:]))


@pytest.mark.parametrize("tokens", [[[5]], [[5, 9, 11, 40]]], ids=["one-token", "four"])
def test_the_gradient_of_the_experts_is_written_in_place_and_whole(model, tokens):
    """Zero for unchosen experts, the same twice from one graph, and of the rows alone where the experts are frozen."""
    model.set_experts_implementation("eager")
    experts = model.model.layers[1].block_sparse_moe.experts
    tokens = torch.tensor(tokens)
    loss = model(tokens).logits.square().mean()
    first, second = (
        torch.autograd.grad(loss, [*experts.parameters(), model.model.norm.weight], retain_graph=True)
        for _ in range(2)
    )
    model.set_experts_implementation("batched_mm")
    expected = torch.autograd.grad(model(tokens).logits.square().mean(), [*experts.parameters()])
    for a, b, c in zip(first, second, expected, strict=False):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-6)
    unchosen = first[0].flatten(1).abs().amax(1) == 0
    assert unchosen.any()

    model.set_experts_implementation("eager")
    for parameter in experts.parameters():
        parameter.requires_grad_(False)
    inputs = model.get_input_embeddings()(tokens).detach().requires_grad_()
    model(inputs_embeds=inputs).logits.square().mean().backward()
    assert inputs.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in experts.parameters())

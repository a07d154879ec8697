"""Eager attention computes a long prompt some queries at a time: the same output, and bounded memory."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_grok1 import Grok1ForCausalLM, attention_grok1
from modeling_grok1 import modeling_grok1 as model_file


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operator made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.fixture
def model(small_config):
    torch.manual_seed(0)
    small_config.max_position_embeddings = 1024
    model = Grok1ForCausalLM(small_config).double().eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    return model


def mask_of(B, T, kind):  # noqa: N803
    mask = torch.ones(B, T, dtype=torch.long)
    if kind == "left":
        mask[0, :37] = 0
    elif kind == "right":
        mask[0, -41:] = 0
    return mask


def watch(monkeypatch, seen):
    """Calls `seen` with query and key of every piece."""
    whole = model_file.eager_attention_forward.__wrapped__

    def attention(module, query, key, *rest, **kwargs):
        seen(query, key)
        return whole(module, query, key, *rest, **kwargs)

    monkeypatch.setattr(model_file, "eager_attention_forward", attention_grok1.in_pieces(attention))


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("rows", [16, 50, 99])
@torch.no_grad()
def test_pieces_give_the_logits_of_the_whole(model, monkeypatch, rows, padding):
    B, T = 2, 100  # noqa: N806
    ids = torch.randint(3, 96, (B, T), generator=torch.Generator().manual_seed(0))
    mask = mask_of(B, T, padding)
    expected = model(ids, attention_mask=mask).logits
    calls = []
    watch(monkeypatch, lambda query, key: calls.append(query.shape[2]))
    monkeypatch.setitem(attention_grok1.SCORE_BYTES, "cpu", 4 * B * model.config.num_attention_heads * T * rows)
    actual = model(ids, attention_mask=mask).logits
    assert set(calls) == {rows, T % rows or rows}
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_piece_reads_the_keys_that_its_mask_leaves_open(model, monkeypatch):
    """A mask of the user's own: a prefix that sees itself whole, then causal."""
    T, prefix = 96, 40  # noqa: N806
    ids = torch.randint(3, 96, (1, T), generator=torch.Generator().manual_seed(3))
    is_open = torch.ones(T, T, dtype=torch.bool).tril()
    is_open[:prefix, :prefix] = True
    mask = torch.zeros(1, 1, T, T, dtype=torch.float64).masked_fill(~is_open, torch.finfo(torch.float64).min)
    expected = model(ids, attention_mask=mask).logits
    keys = []
    watch(monkeypatch, lambda query, key: keys.append(key.shape[2]))
    monkeypatch.setitem(attention_grok1.SCORE_BYTES, "cpu", 1)  # 16 rows
    actual = model(ids, attention_mask=mask).logits
    assert keys == [40, 40, 48, 64, 80, 96] * model.config.num_hidden_layers
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_prompt_after_a_cache_is_computed_in_pieces_too(model, monkeypatch):
    ids = torch.randint(3, 96, (1, 120), generator=torch.Generator().manual_seed(1))
    expected = model(ids).logits[:, 40:]
    monkeypatch.setitem(attention_grok1.SCORE_BYTES, "cpu", 1)  # 16 rows
    cache = model(ids[:, :40], use_cache=True).past_key_values
    torch.testing.assert_close(model(ids[:, 40:], past_key_values=cache).logits, expected, rtol=0, atol=1e-12)


def test_weights_are_whole(model, monkeypatch):
    ids = torch.randint(3, 96, (1, 64), generator=torch.Generator().manual_seed(2))
    monkeypatch.setitem(attention_grok1.SCORE_BYTES, "cpu", 1)
    with torch.no_grad():
        attentions = model(ids, output_attentions=True).attentions
        assert [tuple(weights.shape) for weights in attentions] == [(1, 4, 64, 64)] * len(attentions)
        model.config.output_attentions = True
        again = model(ids).attentions
        model.config.output_attentions = False
    assert all(torch.equal(one, other) for one, other in zip(attentions, again, strict=True))


def gradients_of(model, batch, checkpointed=False):
    model.train().zero_grad()
    if checkpointed:
        model.activation_checkpointing_enable({"use_reentrant": False})
    model(**batch, labels=batch["input_ids"]).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("rows", [16, 99])
def test_pieces_give_the_gradients_of_the_whole(model, monkeypatch, rows, padding, checkpointed):
    B, T = 2, 100  # noqa: N806
    ids = torch.randint(3, 96, (B, T), generator=torch.Generator().manual_seed(2))
    batch = {"input_ids": ids, "attention_mask": mask_of(B, T, padding)}
    expected = gradients_of(model, batch)
    calls = []
    watch(monkeypatch, lambda query, key: calls.append(query.shape[2]))
    monkeypatch.setitem(attention_grok1.SCORE_BYTES, "cpu", 4 * B * model.config.num_attention_heads * T * rows)
    actual = gradients_of(model, batch, checkpointed)
    times = 3 if checkpointed else 2  # forward, again under a checkpoint, and again for the gradients
    assert len(calls) == times * model.config.num_hidden_layers * -(-T // rows)
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-10, atol=1e-12, msg=name)


def test_gradients_of_autocast_are_those_of_the_whole(model, monkeypatch):
    model, ids = model.float(), torch.randint(3, 96, (1, 64), generator=torch.Generator().manual_seed(2))
    found = []
    for nbytes in (2**30, 1):
        monkeypatch.setitem(attention_grok1.SCORE_BYTES, "cpu", nbytes)
        with torch.autocast("cpu", torch.bfloat16):
            found.append(gradients_of(model, {"input_ids": ids}))
    for name, gradient in found[0].items():
        assert found[1][name].dtype == gradient.dtype
        assert (found[1][name] - gradient).norm() <= 0.05 * gradient.norm(), name


def test_scores_are_not_kept_for_the_backward_pass(model):
    """Bytes that autograd keeps, for twice the tokens: little more than twice, where scores would be four times."""
    kept = []
    for T in (500, 1000):  # noqa: N806
        seen: dict[int, int] = {}

        def keep(tensor, seen=seen):
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = model.model(torch.randint(3, 96, (1, T)), use_cache=False)
        kept.append(sum(seen.values()))
        del output
    assert kept[1] < 2.5 * kept[0]


@torch.no_grad()
def test_no_tensor_grows_with_the_square_of_the_prompt(model):
    T = 1000  # noqa: N806
    with LargestTensor() as largest:
        model.model(torch.randint(3, 96, (1, T)), use_cache=False)
    H = model.config.num_attention_heads  # noqa: N806
    pieces = attention_grok1.SCORE_BYTES["cpu"] // 4
    assert largest.numel <= max(pieces, T * T)  # of the scores, or the mask
    assert 3 * pieces < H * T * T  # what all scores would be

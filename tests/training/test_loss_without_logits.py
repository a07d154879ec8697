"""`skip_logits`: the loss and the gradients are those of the logits, with adapters on the head and under autocast, and
no tensor of all logits is made."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_grok1 import Grok1ForCausalLM, losses_grok1


TOKENS = torch.randint(3, 96, (2, 40), generator=torch.Generator().manual_seed(0))


class Rows(TorchDispatchMode):
    """The largest number of rows of 96 logits that any operator made."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (96,):
                self.most = max(self.most, tensor.numel() // 96)
        return result


@pytest.fixture
def model(small_config, monkeypatch) -> Grok1ForCausalLM:
    monkeypatch.setattr(losses_grok1, "LOGIT_BYTES", 4 * 96 * 36)  # 36 rows, more than the transposed weight has
    torch.manual_seed(0)
    small_config.initializer_range = 0.2
    small_config.intermediate_size = 40  # gate and up are not as wide as the logits
    return Grok1ForCausalLM(small_config).train()


def loss_and_gradients(model, **options):
    model.zero_grad()
    output = model(input_ids=TOKENS, labels=TOKENS, **options)
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["plain", "head adapted", "autocast", "bfloat16"])
def test_the_loss_and_gradients_are_those_of_the_logits(model, kind):
    if kind == "head adapted":
        peft = pytest.importorskip("peft")
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        lora = peft.LoraConfig(target_modules=["lm_head", "q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, lora)
    if kind == "bfloat16":
        model = model.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        whole, expected = loss_and_gradients(model)
        output, actual = loss_and_gradients(model, skip_logits=True)
    assert whole.logits.shape == (2, 40, 96)
    assert output.logits is None
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, whole.loss, rtol=1e-6, atol=0)
    assert actual.keys() == expected.keys()
    bound = 1e-5 if kind in ("plain", "head adapted") else 0.02
    for name, gradient in expected.items():
        assert (actual[name] - gradient).norm() <= bound * gradient.norm(), name


def test_no_more_rows_of_logits_are_made_than_fit(model):
    for skip, most in ((False, 80), (True, 36)):
        with Rows() as rows:
            loss_and_gradients(model, skip_logits=skip)
        assert rows.most == most


def test_without_labels_there_are_logits(model):
    assert model(input_ids=TOKENS, skip_logits=True).logits.shape == (2, 40, 96)

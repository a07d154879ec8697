"""llama.cpp says the same words, and every difference in its logits is one that is named, built and measured here."""

import shutil

import pytest
import torch
from activations import replace_activation
from deviations import look_up_gelu, renormalise_gates, round_activations, shake
from gguf_names import gguf_place, read_gguf
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer


@pytest.fixture(scope="module")
def sequences(hub, passages) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(hub("float32"))
    return tokenizer([passage["opening"] + passage["continuation"] for passage in passages])["input_ids"]


@pytest.fixture(scope="module")
def theirs(runtime, sequences):
    """theirs(file, cache): llama.cpp's logits of all passages, one below the other."""
    return lambda file, cache=torch.float32: torch.cat([runtime(file, cache).logits(ids) for ids in sequences])


@pytest.fixture(scope="module")
def ours(sequences):
    """ours(model): this package's logits of all passages, one below the other."""

    def logits(model) -> torch.Tensor:
        with torch.inference_mode():
            return torch.cat([model(torch.tensor([ids])).logits[0] for ids in sequences])

    return logits


class Difference:
    """Between two tables of logits: the largest, the mean, and the median of the largest of each position."""

    def __init__(self, a: torch.Tensor, b: torch.Tensor):
        difference = (a - b).abs()
        self.max, self.mean = difference.max().item(), difference.mean().item()
        self.typical = difference.amax(-1).median().item()
        self.agree = (a.argmax(-1) == b.argmax(-1)).sum().item()

    def row(self, what: str) -> str:
        return f"| {what} | {self.max:.1e} | {self.mean:.1e} | {self.typical:.1e} | {self.agree} |"


@pytest.mark.parametrize("outtype", ["f32", "q8_0", "bf16"])
def test_it_recites_the_demo(outtype, hub, gguf, runtime, load, passages, measured):
    folder = hub("bfloat16" if outtype == "bf16" else "float32")
    llama, tokenizer, model = runtime(gguf(folder, outtype)), AutoTokenizer.from_pretrained(folder), load(folder)
    for passage in passages:
        prompt = llama.llama.tokenize(passage["opening"].encode(), add_bos=True, special=False)
        assert prompt == tokenizer(passage["opening"])["input_ids"]  # add_bos: the folder says that there is none
        steps = len(tokenizer(passage["opening"] + passage["continuation"])["input_ids"]) - len(prompt)
        said = llama.greedy(prompt, steps)
        assert (
            said
            == model.generate(torch.tensor([prompt]), max_new_tokens=steps, do_sample=False)[0, len(prompt) :].tolist()
        )
        assert tokenizer.decode(prompt + said) == passage["opening"] + passage["continuation"]
    measured(f"{outtype}: {len(passages)} of {len(passages)} passages word for word")


def test_float32_differs_by_the_table_of_gelu_and_nothing_else(hub, gguf, load, theirs, ours, measured):
    folder = hub("float32")
    llama, plain = theirs(gguf(folder, "f32")), ours(load(folder))
    rebuilt = ours(renormalise_gates(look_up_gelu(load(folder))))
    noise = Difference(rebuilt, ours(shake(renormalise_gates(look_up_gelu(load(folder))))))
    between, explained = Difference(llama, plain), Difference(llama, rebuilt)
    measured(between.row("f32: llama.cpp - this package"))
    measured(Difference(plain, ours(renormalise_gates(load(folder)))).row("effect of renormalised gates"))
    measured(Difference(plain, ours(look_up_gelu(load(folder)))).row("effect of the GELU table"))
    measured(explained.row("f32: llama.cpp - this package with both"))
    measured(noise.row("this package with both, norms moved by one unit in the last place"))
    measured(
        Difference(plain, ours(shake(load(folder)))).row("this package, norms moved by one unit in the last place")
    )
    assert between.agree == explained.agree == len(llama)
    assert between.max < 2e-2 and between.mean < 1e-3
    # The table is a staircase, on which any two float32 programs step apart now and then: so far and no further.
    assert explained.mean < between.mean / 3
    assert explained.mean < 1.5 * noise.mean and explained.typical < 1.5 * noise.typical


@pytest.mark.parametrize("quieter", [0, 8])
def test_beyond_the_table_logits_agree_to_1e4(quieter, hub, gguf, load, theirs, ours, tmp_path, measured):
    """
    With w1 times 2^12 nearly every input of GELU lies outside of the table, where both compute 0 or x; with w2 times
    2^-12 the output is what it was. Nothing is left of the GELU table, so the rest must agree as float32 does.

    The norm after the experts divides by their length, and with it any factor that the two gates share, but for its
    epsilon. Experts 2^8 times quieter bring the epsilon out.
    """
    steep = tmp_path / "steep"
    shutil.copytree(hub("float32"), steep)
    (file,) = steep.glob("*.safetensors")
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if name.endswith(".w1.weight"):
            tensor *= 2.0**12
        elif name.endswith(".w2.weight"):
            tensor *= 2.0 ** -(12 + quieter)
    save_file(tensors, file, metadata={"format": "pt"})
    llama, plain, renormalised = theirs(gguf(steep, "f32")), ours(load(steep)), ours(renormalise_gates(load(steep)))
    between, explained = Difference(llama, plain), Difference(llama, renormalised)
    measured(between.row(f"steep experts, 2^-{quieter}: llama.cpp - this package"))
    measured(explained.row(f"steep experts, 2^-{quieter}: llama.cpp - this package with renormalised gates"))
    assert explained.max < 1e-4 and explained.agree == len(llama)
    assert between.mean > 3 * explained.mean
    if quieter:
        assert between.max > 1


def test_the_float16_cache_is_the_larger_part_of_the_difference(hub, gguf, theirs, measured):
    file = gguf(hub("float32"), "f32")
    exact, default = theirs(file), theirs(file, torch.float16)
    difference = Difference(exact, default)
    measured(difference.row("llama.cpp: cache in float16 (its default) - cache in float32"))
    assert difference.agree == len(exact) and difference.max < 1


def test_q8_0_differs_by_the_rounding_of_weights_and_activations(hub, gguf, load, theirs, ours, measured):
    file = gguf(hub("float32"), "q8_0")
    stored = {name: values for name, (_, values) in read_gguf(file).items()}

    def rounded():
        """The weights of the GGUF file. The head is not the embedding's: q8_0 rounds both alike."""
        model = load(hub("float32"))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                place, expert = gguf_place(name)
                parameter.copy_(stored[place] if expert is None else stored[place][expert])
        return model

    assert torch.equal(stored["output.weight"], stored["token_embd.weight"])
    llama, plain, weights = theirs(file), ours(load(hub("float32"))), ours(rounded())
    rebuilt = ours(round_activations(renormalise_gates(look_up_gelu(rounded()))))
    noise = Difference(rebuilt, ours(shake(round_activations(renormalise_gates(look_up_gelu(rounded()))))))
    between, explained = Difference(llama, plain), Difference(llama, rebuilt)
    measured(between.row("q8_0: llama.cpp - this package in float32"))
    measured(Difference(llama, weights).row("q8_0: llama.cpp - this package with the rounded weights"))
    measured(explained.row("q8_0: llama.cpp - this package with all of its rounding"))
    measured(noise.row("this package with all of its rounding, norms moved by one unit in the last place"))
    assert between.agree == explained.agree == len(llama)
    assert between.mean < 0.3
    assert explained.mean < between.mean / 2
    assert explained.mean < 1.5 * noise.mean and explained.typical < 1.5 * noise.typical


def test_a_wrong_model_is_outside_of_these_bounds(hub, gguf, load, theirs, ours):
    """GELU with erf, or a scale of attention that is 1 % off."""
    llama = theirs(gguf(hub("float32"), "f32"))
    rebuilt, erf, scaled = (renormalise_gates(look_up_gelu(load(hub("float32")))) for _ in range(3))
    replace_activation(erf, torch.nn.GELU())
    for layer in scaled.model.layers:
        layer.self_attn.scaling *= 1.01
    explained = Difference(llama, ours(rebuilt))
    for wrong in (erf, scaled):
        assert Difference(llama, ours(wrong)).mean > 3 * explained.mean

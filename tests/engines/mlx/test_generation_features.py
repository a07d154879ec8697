"""Every generation feature of mlx-lm gives the model's own greedy text, and their text is right to the character."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import greedy
from mlx_lm import batch_generate, generate, stream_generate
from mlx_lm.models.cache import QuantizedKVCache, load_prompt_cache, make_prompt_cache, save_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_tokenizer


Passages = list[dict[str, str]]
TOKENS = 24


def said(model: nn.Module, tokenizer: TokenizerWrapper, prompt: list[int], **options) -> list[int]:
    return [step.token for step in stream_generate(model, tokenizer, prompt, max_tokens=TOKENS, **options)]


def test_text_is_right_to_the_character(demo: nn.Module, tokenizer: TokenizerWrapper, passages: Passages) -> None:
    for passage in passages:
        whole = generate(demo, tokenizer, passage["opening"], max_tokens=TOKENS)
        pieces = [step.text for step in stream_generate(demo, tokenizer, passage["opening"], max_tokens=TOKENS)]
        assert "".join(pieces) == whole
        assert len(whole) > 20 and passage["continuation"].startswith(whole)


def test_the_tokenizer_of_the_card_keeps_the_first_space(
    demo: nn.Module, folder: Callable[[str], Path], passages: Passages, tmp_path: Path
) -> None:
    """mlx-lm drops the first space with the tokenizer for whole texts; the card has the lines that change it."""
    shutil.copytree(folder("demo-whole-texts"), tmp_path / "folder")
    for keeps in (False, True):
        tokenizer = load_tokenizer(tmp_path / "folder", {"trust_remote_code": True})
        for passage in passages:
            text = generate(demo, tokenizer, passage["opening"], max_tokens=TOKENS)
            expected = passage["continuation"] if keeps else passage["continuation"].removeprefix(" ")
            assert len(text) > 20 and expected.startswith(text)
        (lines,) = re.findall(
            r"```python\n(import json\n.*?)```",
            (tmp_path / "folder" / "README.md").read_text(encoding="utf-8"),
            re.DOTALL,
        )
        exec(lines.replace("FOLDER", str(tmp_path / "folder")), {})


def test_the_command(
    mlx_lm: Callable[..., str], folder: Callable[[str], Path], tokenizer: TokenizerWrapper, passages: Passages
) -> None:
    passage = passages[0]
    options = ("--prompt", passage["opening"], "--max-tokens", TOKENS, "--temp", 0)
    printed = mlx_lm("generate", "--model", folder("demo-int8"), *options)
    text = printed.split("==========\n")[1].removesuffix("\n")
    assert len(text) > 20 and passage["continuation"].startswith(text)


def test_a_batch_of_32_prompts_says_what_single_ones_say(
    demo: nn.Module, tokenizer: TokenizerWrapper, passages: Passages
) -> None:
    words = " ".join(passage["opening"] + passage["continuation"] for passage in passages).split(" ")
    prompts = [tokenizer.encode(" ".join(words[7 * i : 7 * i + 1 + i])) for i in range(32)]
    assert len({len(prompt) for prompt in prompts}) > 20
    batch = batch_generate(demo, tokenizer, prompts, max_tokens=TOKENS, return_token_ids=True)
    for prompt, found in zip(prompts, batch.token_ids, strict=True):
        assert found == [t for t in said(demo, tokenizer, prompt) if t not in tokenizer.eos_token_ids]


def test_a_prompt_cache_is_saved_and_read_again(
    demo: nn.Module, tokenizer: TokenizerWrapper, passages: Passages, tmp_path: Path
) -> None:
    prompt = tokenizer.encode(passages[0]["opening"])
    cache = make_prompt_cache(demo)
    demo(mx.array([prompt[:-2]]), cache)
    save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
    again = load_prompt_cache(str(tmp_path / "cache.safetensors"))
    assert greedy(demo, prompt[-2:], TOKENS, again) == greedy(demo, prompt, TOKENS)


def test_a_cached_prompt_of_the_command(
    mlx_lm: Callable[..., str], folder: Callable[[str], Path], passages: Passages, tmp_path: Path
) -> None:
    """The command leaves out the tokens of the cached prompt, so the second prompt is the rest."""
    text, model = passages[0]["opening"] + passages[0]["continuation"], ("--model", folder("demo"))
    cut = text.index("\n")
    mlx_lm("cache_prompt", *model, "--prompt", text[:cut], "--prompt-cache-file", tmp_path / "c.safetensors")
    options = ("--prompt-cache-file", tmp_path / "c.safetensors", "--max-tokens", TOKENS, "--temp", 0)
    printed = mlx_lm("generate", *options, "--prompt", "\nMade glorious")
    assert "summer by this sun of York" in printed


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_cache_keeps_the_cap_and_the_mask(
    bits: int, demo: nn.Module, tokenizer: TokenizerWrapper, passages: Passages
) -> None:
    """The largest change of a logit (of about 29) is that of rounding keys and values, for a prompt and for a step."""
    ids = mx.array([tokenizer.encode(passages[0]["opening"] + passages[0]["continuation"])])
    plain, rounded = make_prompt_cache(demo), [QuantizedKVCache(group_size=32, bits=bits) for _ in demo.layers]
    exact = np.concatenate([np.array(demo(part, plain)) for part in (ids[:, :-1], ids[:, -1:])], axis=1)
    found = np.concatenate([np.array(demo(part, rounded)) for part in (ids[:, :-1], ids[:, -1:])], axis=1)
    difference = np.sqrt(np.mean((found - exact) ** 2)) / np.std(exact)
    print(f"{bits} bits: {difference:.1e} of the logits' deviation, largest {np.abs(found - exact).max():.2f}")
    assert 0 < difference < {8: 0.02, 4: 0.2}[bits]


def test_a_quantised_cache_recites(demo: nn.Module, tokenizer: TokenizerWrapper, passages: Passages) -> None:
    for passage in passages:
        prompt = tokenizer.encode(passage["opening"])
        found = said(demo, tokenizer, prompt, kv_bits=8, kv_group_size=32, quantized_kv_start=0)
        assert found == said(demo, tokenizer, prompt)


def test_a_rotating_cache_holds_its_size(demo: nn.Module, tokenizer: TokenizerWrapper, passages: Passages) -> None:
    prompt = tokenizer.encode(passages[0]["opening"])
    assert said(demo, tokenizer, prompt, max_kv_size=len(prompt) + TOKENS) == said(demo, tokenizer, prompt)
    small = make_prompt_cache(demo, max_kv_size=16)
    found = said(demo, tokenizer, prompt, prompt_cache=small)
    assert len(found) == TOKENS and found[:8] == said(demo, tokenizer, prompt)[:8]
    assert small[0].keys.shape[2] == 16


def test_speculative_decoding(
    demo: nn.Module, load: Callable[..., nn.Module], folder: Callable[[str], Path], tokenizer: TokenizerWrapper,
    passages: Passages,
) -> None:  # fmt: skip
    """The demo as its own draft, and the demo in 4 bits as its draft: the same text, most of it from the draft."""
    prompt = tokenizer.encode(passages[0]["opening"])
    for draft in (demo, load(folder("demo-int4-g32"))):
        steps = list(stream_generate(demo, tokenizer, prompt, max_tokens=TOKENS, draft_model=draft))
        assert [step.token for step in steps] == said(demo, tokenizer, prompt)
        assert sum(step.from_draft for step in steps) > TOKENS // 2

"""`generate` against decoding loops of a few lines: no cache, one forward pass over everything for each token.

Processors, sampling, beams, constraints and guidance are written again here, from their definitions.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList


NEW = 12
TOLERANCE = 1e-4

# (tokens so far T, scores V of the next) -> scores V
Process = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@pytest.fixture(scope="module")
def model(converted):
    return AutoModelForCausalLM.from_pretrained(converted("tiny-1", "float32"), dtype=torch.float32)


@pytest.fixture(scope="module")
def xai(reference):
    return reference("tiny-1", "fp32")


@pytest.fixture(scope="module")
def prompt(xai) -> torch.Tensor:
    return xai.prompt[0]


@torch.no_grad()
def next_scores(model, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens[None], use_cache=False).logits[0, -1]


def decode(model, tokens: torch.Tensor, process: Process, pick=torch.argmax, new: int = NEW) -> list[int]:
    length = len(tokens)
    for _ in range(new):
        tokens = torch.cat((tokens, pick(process(tokens, next_scores(model, tokens))).view(1)))
    return tokens[length:].tolist()


def generated(model, tokens: torch.Tensor, **options: Any) -> list[list[int]]:
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, **options}
    output = model.generate(tokens[None], attention_mask=torch.ones_like(tokens[None]), **options)
    return output[:, len(tokens) :].tolist()


# --------------------------------------------------------------------------------------------------------------------
# Greedy with processors
# --------------------------------------------------------------------------------------------------------------------
def repetition_penalty(factor: float) -> Process:
    def process(tokens, scores):
        scores = scores.clone()
        for token in set(tokens.tolist()):
            scores[token] = scores[token] * factor if scores[token] < 0 else scores[token] / factor
        return scores

    return process


def no_repeat_ngram(n: int) -> Process:
    def process(tokens, scores):
        scores, ids = scores.clone(), tokens.tolist()
        begin = ids[len(ids) - n + 1 :]
        for i in range(len(ids) - n + 1):
            if ids[i : i + n - 1] == begin:
                scores[ids[i + n - 1]] = -math.inf
        return scores

    return process


def forbid(ids: list[int]) -> Process:
    return lambda tokens, scores: scores.index_fill(0, torch.tensor(ids), -math.inf)


def forbid_words(words: list[list[int]]) -> Process:
    """The last token of a word, where the tokens before it have just been said."""

    def process(tokens, scores):
        ids = tokens.tolist()
        ends = [word[-1] for word in words if len(word) == 1 or ids[-len(word) + 1 :] == word[:-1]]
        return forbid(ends)(tokens, scores)

    return process


def bias(token: int, value: float) -> Process:
    return lambda tokens, scores: scores.index_add(0, torch.tensor([token]), torch.tensor([value]))


def allowed(tokens: torch.Tensor) -> list[int]:
    """Even tokens after an even one, odd ones after an odd one."""
    return list(range(int(tokens[-1]) % 2, 256, 2))


def only_allowed(tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    kept = torch.full_like(scores, -math.inf)
    ids = torch.tensor(allowed(tokens))
    kept[ids] = scores[ids]
    return kept


@pytest.fixture(scope="module")
def cases(xai, prompt) -> dict[str, tuple[dict[str, Any], Process]]:
    greedy = xai.greedy.tolist()
    words = [[greedy[0]], [greedy[2], greedy[3]]]
    last = len(prompt) + NEW - 1
    return {
        "nothing": ({}, lambda tokens, scores: scores),
        "repetition_penalty": ({"repetition_penalty": 3.0}, repetition_penalty(3.0)),
        "no_repeat_ngram_size": ({"no_repeat_ngram_size": 1}, no_repeat_ngram(1)),
        "bad_words_ids": ({"bad_words_ids": words}, forbid_words(words)),
        "suppress_tokens": ({"suppress_tokens": greedy[:4]}, forbid(greedy[:4])),
        "begin_suppress_tokens": (
            {"begin_suppress_tokens": greedy[:1]},
            lambda tokens, scores: forbid(greedy[:1])(tokens, scores) if len(tokens) == len(prompt) else scores,
        ),
        "sequence_bias": ({"sequence_bias": {(7,): 4.5}}, bias(7, 4.5)),
        "prefix_allowed_tokens_fn": ({"prefix_allowed_tokens_fn": lambda _, tokens: allowed(tokens)}, only_allowed),
        "min_new_tokens": (
            {"min_new_tokens": NEW, "eos_token_id": greedy[3], "pad_token_id": 0},
            forbid([greedy[3]]),
        ),
        "forced_eos_token_id": (
            {"forced_eos_token_id": 5},
            lambda tokens, scores: (
                forbid([i for i in range(256) if i != 5])(tokens, scores) if len(tokens) == last else scores
            ),
        ),
        "several": (
            {"repetition_penalty": 2.0, "suppress_tokens": greedy[:2], "no_repeat_ngram_size": 2},
            lambda tokens, scores: forbid(greedy[:2])(
                tokens, no_repeat_ngram(2)(tokens, repetition_penalty(2.0)(tokens, scores))
            ),
        ),
    }


CASES = [
    *("nothing", "repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens"),
    *("begin_suppress_tokens", "sequence_bias", "prefix_allowed_tokens_fn", "min_new_tokens"),
    *("forced_eos_token_id", "several"),
]


@pytest.mark.parametrize("case", CASES)
def test_processors(model, xai, prompt, cases, case):
    options, process = cases[case]
    expected = decode(model, prompt, process)
    assert (expected != xai.greedy[:NEW].tolist()) == (case != "nothing")
    assert generated(model, prompt, **options) == [expected]


def test_a_processor_of_the_users_own(model, prompt):
    class Squared(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return -((scores - 1.0) ** 2)

    expected = decode(model, prompt, lambda tokens, scores: -((scores - 1.0) ** 2))
    assert generated(model, prompt, logits_processor=LogitsProcessorList([Squared()])) == [expected]


@pytest.mark.parametrize("unconditional", [None, [9, 8, 7]])
def test_classifier_free_guidance(model, prompt, unconditional):
    """log p + (w - 1) (log p - log q), where q saw another prompt: the given one, or the last token only."""
    start = prompt[-1:] if unconditional is None else torch.tensor(unconditional)

    def guided(tokens, scores):
        other = next_scores(model, torch.cat((start, tokens[len(prompt) :])))
        p, q = scores.log_softmax(-1), other.log_softmax(-1)
        return q + 2.5 * (p - q)

    options = {} if unconditional is None else {"negative_prompt_ids": start[None]}
    assert generated(model, prompt, guidance_scale=2.5, **options) == [decode(model, prompt, guided)]


# --------------------------------------------------------------------------------------------------------------------
# Sampling
# --------------------------------------------------------------------------------------------------------------------
def top_k(scores: torch.Tensor, k: int) -> torch.Tensor:
    return scores.masked_fill(scores < scores.sort(descending=True).values[k - 1], -math.inf)


def top_p(scores: torch.Tensor, p: float) -> torch.Tensor:
    """The fewest tokens whose probabilities reach p."""
    order = scores.argsort(descending=True)
    before = scores[order].softmax(-1).cumsum(-1) - scores[order].softmax(-1)
    return scores.index_fill(0, order[before >= p], -math.inf)


def min_p(scores: torch.Tensor, p: float) -> torch.Tensor:
    probabilities = scores.softmax(-1)
    return scores.masked_fill(probabilities < p * probabilities.max(), -math.inf)


@pytest.mark.parametrize(
    ("options", "warp"),
    [
        ({"temperature": 1.7, "top_k": 0}, lambda scores: scores / 1.7),
        ({"top_k": 5}, lambda scores: top_k(scores, 5)),
        ({"top_k": 0, "top_p": 0.6}, lambda scores: top_p(scores, 0.6)),
        ({"top_k": 0, "min_p": 0.3}, lambda scores: min_p(scores, 0.3)),
        ({"temperature": 0.7, "top_k": 20, "top_p": 0.8}, lambda scores: top_p(top_k(scores / 0.7, 20), 0.8)),
    ],
    ids=["temperature", "top_k", "top_p", "min_p", "several"],
)
def test_sampling_draws_from_the_warped_distribution(model, prompt, options, warp):
    torch.manual_seed(5)
    expected = decode(
        model,
        prompt,
        lambda tokens, scores: warp(scores),
        pick=lambda scores: torch.multinomial(scores.softmax(-1), 1),
    )
    torch.manual_seed(5)
    assert generated(model, prompt, do_sample=True, **options) == [expected]


def test_several_samples_of_a_prompt_are_those_of_a_batch_of_it(model, prompt):
    torch.manual_seed(6)
    tokens = prompt.repeat(3, 1)
    for _ in range(NEW):
        with torch.no_grad():
            scores = model(tokens, use_cache=False).logits[:, -1]
        tokens = torch.cat((tokens, torch.multinomial(scores.softmax(-1), 1)), dim=1)
    torch.manual_seed(6)
    found = generated(model, prompt, do_sample=True, top_k=0, num_return_sequences=3)
    assert found == tokens[:, len(prompt) :].tolist()
    assert len({tuple(row) for row in found}) == 3


# --------------------------------------------------------------------------------------------------------------------
# Beams
# --------------------------------------------------------------------------------------------------------------------
def beam_search(model, prompt: torch.Tensor, beams: int, process: Process, new: int) -> list[tuple[float, list[int]]]:
    """The `beams` likeliest sequences that a search of this width finds, best first."""
    found = [(0.0, prompt)]
    for _ in range(new):
        longer = []
        for likelihood, tokens in found:
            logprobs = process(tokens, next_scores(model, tokens).log_softmax(-1))
            best = logprobs.topk(beams)
            longer += [
                (likelihood + value.item(), torch.cat((tokens, token.view(1))))
                for value, token in zip(best.values, best.indices, strict=True)
            ]
        found = sorted(longer, key=lambda pair: -pair[0])[:beams]
    return [(likelihood, tokens[len(prompt) :].tolist()) for likelihood, tokens in found]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize(
    ("options", "process", "power"),
    [
        ({}, lambda tokens, scores: scores, 1.0),
        ({"length_penalty": 0.0}, lambda tokens, scores: scores, 0.0),
        ({"no_repeat_ngram_size": 1}, no_repeat_ngram(1), 1.0),
        ({"prefix_allowed_tokens_fn": lambda _, tokens: allowed(tokens)}, only_allowed, 1.0),
    ],
    ids=["plain", "length_penalty", "no_repeat_ngram_size", "prefix_allowed_tokens_fn"],
)
def test_beam_search(model, prompt, options, process, power, cache):
    expected = beam_search(model, prompt, 3, process, new=8)
    output = model.generate(
        prompt[None],
        attention_mask=torch.ones_like(prompt[None]),
        max_new_tokens=8,
        eos_token_id=None,
        num_beams=3,
        num_return_sequences=3,
        cache_implementation=cache,
        disable_compile=True,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    assert output.sequences[:, len(prompt) :].tolist() == [tokens for _, tokens in expected]
    likelihoods = torch.tensor([likelihood / 8**power for likelihood, _ in expected])
    torch.testing.assert_close(output.sequences_scores, likelihoods, rtol=0, atol=TOLERANCE)


def test_sampled_beams_follow_the_seed(model, prompt):
    def sampled(seed):
        torch.manual_seed(seed)
        return generated(model, prompt, num_beams=3, num_return_sequences=3, do_sample=True, top_k=0, temperature=2.0)

    assert sampled(0) == sampled(0) != sampled(1)
    assert len({tuple(beam) for beam in sampled(0)}) == 3


# --------------------------------------------------------------------------------------------------------------------
# What is returned
# --------------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def test_everything_that_can_be_returned(model, xai, prompt):
    length, new = len(prompt), len(xai.greedy)
    output = model.generate(
        xai.prompt,
        attention_mask=torch.ones_like(xai.prompt),
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=None,
        repetition_penalty=1.0,
        suppress_tokens=[3],
        return_dict_in_generate=True,
        output_logits=True,
        output_scores=True,
        output_hidden_states=True,
        output_attentions=True,
    )
    assert output.sequences[0, length:].tolist() == xai.greedy.tolist()
    logits, scores = torch.cat(output.logits), torch.cat(output.scores)
    assert (logits - xai.greedy_logits).abs().max() <= TOLERANCE  # xAI's own, from its own cache
    assert (scores[:, 3] == -math.inf).all()
    assert torch.equal(scores[:, 4:], logits[:, 4:])
    transitions = model.compute_transition_scores(output.sequences, output.scores, normalize_logits=True)[0]
    expected = scores.log_softmax(-1).gather(1, xai.greedy[:, None])[:, 0]
    torch.testing.assert_close(transitions, expected)

    whole = model(output.sequences[:, :-1], use_cache=False, output_hidden_states=True, output_attentions=True)
    layers = model.config.num_hidden_layers
    assert len(output.hidden_states) == len(output.attentions) == new
    for step in range(new):
        rows = slice(0, length) if step == 0 else slice(length + step - 1, length + step)
        for i in range(layers + 1):
            actual = output.hidden_states[step][i]
            assert (actual - whole.hidden_states[i][:, rows]).abs().max() <= TOLERANCE
        for i in range(layers):
            actual = output.attentions[step][i]
            assert (actual - whole.attentions[i][:, :, rows, : length + step]).abs().max() <= TOLERANCE
    assert output.past_key_values.get_seq_length() == length + new - 1


def test_router_logits_are_accepted_and_change_nothing(model, xai, prompt):
    """`generate` has no field for them; a forward pass over what was generated gives them."""
    options = {"output_router_logits": True, "return_dict_in_generate": True}
    output = model.generate(
        xai.prompt, attention_mask=torch.ones_like(xai.prompt), max_new_tokens=NEW, eos_token_id=None, **options
    )
    assert output.sequences[0, len(prompt) :].tolist() == xai.greedy[:NEW].tolist()
    assert "router_logits" not in output


def test_a_decoding_loop_of_the_users_own(model, xai, prompt):
    def second_best(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        while not stopping_criteria(input_ids, None).all():
            scores = model(input_ids).logits[:, -1]
            input_ids = torch.cat((input_ids, scores.topk(2).indices[:, 1:]), dim=1)
        return input_ids

    expected = decode(model, prompt, lambda tokens, scores: scores, pick=lambda scores: scores.topk(2).indices[1])
    assert generated(model, prompt, custom_generate=second_best) == [expected]


@pytest.mark.parametrize(
    ("options", "repository"),
    [
        ({"num_beams": 2, "force_words_ids": [[5]]}, "constrained-beam-search"),
        ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5}, "group-beam-search"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive-search"),
        ({"dola_layers": "low"}, "dola"),
    ],
    ids=["constrained", "groups", "contrastive", "dola"],
)
def test_what_transformers_moved_to_the_hub_says_so(model, prompt, options, repository):
    """Without a network, and without running anything."""
    with pytest.raises(ValueError, match=f"trust_remote_code=True.*transformers-community/{repository}"):
        generated(model, prompt, **options)

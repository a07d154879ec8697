"""`experts_on`: only the chosen experts are read, from the checkpoint's own files, and nothing else changes."""

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from small_grok import LAYERS, prompt, rename_as_hpcai, save_small_grok
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BitsAndBytesConfig,
)

from modeling_grok1 import Grok1ForCausalLM, GrokConfig
from modeling_grok1.offloading_grok1 import ExpertStore, read_tensor
from modeling_grok1.quantization_grok1 import Grok1Int8Config
from modeling_grok1.sizes_grok1 import parse_size


EXPERTS, TOP_K = 8, 2
EXPERT_BYTES = 3 * 64 * 96 * 4  # three matrices D x F in float32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_small_grok(tmp_path_factory.mktemp("offload"))


@pytest.fixture(scope="module")
def sharded(folder, tmp_path_factory):
    """The same weights in eleven files, as a large checkpoint has them."""
    path = tmp_path_factory.mktemp("offload-sharded")
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(path, max_shard_size="300KB")
    assert len(list(path.glob("*.safetensors"))) > 8
    return path


@pytest.fixture(scope="module")
def whole(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture
def reads(monkeypatch):
    """The names of the tensors that are read from disk."""
    names = []

    def counting(stored, buffer=None):
        names.append(stored.name)
        return read_tensor(stored, buffer)

    monkeypatch.setattr("modeling_grok1.offloading_grok1.read_tensor", counting)
    return names


@torch.no_grad()
def logits_of(model, ids):
    return model(ids).logits


def chosen_experts(model, ids):
    """(layer, expert) that the router chooses, from its logits."""
    with torch.no_grad():
        router_logits = model(ids, output_router_logits=True).router_logits
    return {
        (layer, int(expert))
        for layer, logits in enumerate(router_logits)
        for expert in logits.softmax(-1).topk(TOP_K)[1].unique()
    }


@pytest.mark.parametrize("place", ["cpu", "disk"])
@pytest.mark.parametrize("cache", [None, EXPERT_BYTES * 3, "1GB"])
def test_logits_and_generation_are_those_of_the_whole_model(whole, sharded, place, cache):
    model = AutoModelForCausalLM.from_pretrained(sharded, experts_on=place, expert_cache=cache)
    ids = prompt(24, batch=2)
    torch.testing.assert_close(logits_of(model, ids), logits_of(whole, ids), rtol=0, atol=1e-4)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(ids, **options), whole.generate(ids, **options))


def test_bfloat16_gives_the_logits_of_the_whole_model(tmp_path):
    folder = save_small_grok(tmp_path, dtype=torch.bfloat16)
    models = [
        AutoModelForCausalLM.from_pretrained(folder, **kw)
        for kw in ({"experts_layout": "linear"}, {"experts_on": "disk"})
    ]
    assert {model.dtype for model in models} == {torch.bfloat16}
    linear, offloaded = (logits_of(model, prompt()) for model in models)
    assert torch.equal(linear, offloaded)


@pytest.fixture(scope="module")
def int8(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("offload-int8")
    quantised = AutoModelForCausalLM.from_pretrained(folder, quantization_config=Grok1Int8Config(scale_blocks=8))
    quantised.save_pretrained(path)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_int8_is_read_with_its_scales_and_gives_the_same_logits(int8, reads, dtype):
    whole = AutoModelForCausalLM.from_pretrained(int8, dtype=dtype)
    model, info = AutoModelForCausalLM.from_pretrained(
        int8, dtype=dtype, experts_on="disk", expert_cache="1MB", output_loading_info=True
    )
    assert not any(info.values())
    assert torch.equal(logits_of(model, prompt()), logits_of(whole, prompt()))
    assert torch.equal(logits_of(model, prompt(1)), logits_of(whole, prompt(1)))
    assert set(model.expert_store.cache[0].popitem()[1]) == {
        f"{matrix}.{part}" for matrix in ("w1", "w2", "w3") for part in ("weight", "weight_scale")
    }
    assert model.expert_store.experts[0, 0]["w2.weight_scale"].shape == (64, 96 // 4)
    assert model.expert_store.cache[1].popitem()[1]["w2.weight_scale"].shape == (64, 8)


def test_one_token_of_int8_reads_a_byte_a_weight_and_the_scales(int8, reads):
    model = AutoModelForCausalLM.from_pretrained(int8, experts_on="disk")
    logits_of(model, prompt(1))
    scales = 2 * (3 * 64 * 96 // 4)  # blocks of 96 / 8 inputs of w2 are groups of 4
    assert model.expert_store.bytes_fetched == LAYERS * TOP_K * (3 * 64 * 96 + scales)
    assert len(reads) == LAYERS * TOP_K * 6


def test_quantising_while_loading_is_refused_with_what_to_do(folder):
    with pytest.raises(ValueError, match=r"`experts_on`.*write an int8 or int4 folder with `grok1 convert`"):
        AutoModelForCausalLM.from_pretrained(folder, experts_on="disk", quantization_config=Grok1Int8Config())


def test_the_code_in_the_folder_does_it_without_the_package(folder):
    program = (
        "import sys, torch; from transformers import AutoModelForCausalLM;"
        f"load = lambda **kw: AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True, **kw);"
        "model, whole = load(experts_on='disk', expert_cache='100KB'), load();"
        "ids = torch.arange(3, 20)[None];"
        "assert (model(ids).logits - whole(ids).logits).abs().max() < 1e-4;"
        "assert model.expert_store.misses and 'modeling_grok1' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=folder.parent)


def test_loading_reads_no_expert_and_misses_none(folder, reads):
    model, info = AutoModelForCausalLM.from_pretrained(folder, experts_on="disk", output_loading_info=True)
    assert reads == []
    assert not any(info.values())
    assert not [name for name in model.state_dict() if ".experts." in name]
    assert sum(p.nbytes for p in model.parameters()) == 4 * (
        320 * 64 + LAYERS * (2 * 64 * 128 + 2 * 64 * 64 + 8 * 64 + 4 * 64) + 64
    )


def test_one_token_reads_two_of_eight_experts_in_each_layer(whole, folder, reads):
    model = AutoModelForCausalLM.from_pretrained(folder, experts_on="disk")
    token = prompt(1)
    logits_of(model, token)
    wanted = {
        f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{matrix}.weight"
        for layer, expert in chosen_experts(whole, token)
        for matrix in ("w1", "w2", "w3")
    }
    assert len(reads) == LAYERS * TOP_K * 3
    assert set(reads) == wanted
    assert model.expert_store.bytes_fetched == LAYERS * EXPERTS * EXPERT_BYTES // 4


def test_a_prompt_reads_each_chosen_expert_once(whole, folder, reads):
    model = AutoModelForCausalLM.from_pretrained(folder, experts_on="disk")
    logits_of(model, prompt(5))
    assert len(reads) == len(set(reads)) == 3 * len(chosen_experts(whole, prompt(5)))


def test_on_the_cpu_everything_is_read_once_and_a_forward_takes_only_the_chosen(folder, reads):
    model = AutoModelForCausalLM.from_pretrained(folder, experts_on="cpu")
    assert len(reads) == len(set(reads)) == LAYERS * EXPERTS * 3
    logits_of(model, prompt(1))
    assert len(reads) == LAYERS * EXPERTS * 3
    assert model.expert_store.bytes_fetched == LAYERS * TOP_K * EXPERT_BYTES


@pytest.mark.parametrize("experts_in_cache", [0, 1, LAYERS + 1, LAYERS * TOP_K, LAYERS * EXPERTS])
def test_the_cache_stays_in_its_budget_and_holds_the_experts_used_last(folder, experts_in_cache):
    budget = experts_in_cache * EXPERT_BYTES + EXPERT_BYTES // 2
    model = AutoModelForCausalLM.from_pretrained(folder, experts_on="disk", expert_cache=budget)
    store = model.expert_store
    largest = 0
    for position in range(12):
        logits_of(model, prompt(12)[:, position : position + 1])
        largest = max(largest, store.cached_bytes)
        really = sum(
            t.nbytes for recent in store.cache.values() for tensors in recent.values() for t in tensors.values()
        )
        assert really == store.cached_bytes <= budget
    assert store.hits + store.misses == 12 * LAYERS * TOP_K
    assert store.bytes_fetched == store.misses * EXPERT_BYTES
    if experts_in_cache <= LAYERS * TOP_K:
        assert largest == experts_in_cache * EXPERT_BYTES
    before = store.hits
    logits_of(model, prompt(12)[:, 11:])  # the same token again
    if experts_in_cache >= LAYERS * TOP_K:
        assert store.hits - before == LAYERS * TOP_K
    elif experts_in_cache == LAYERS + 1:
        # One slot a layer and a second in the first: a single cache of five would have dropped them all.
        assert store.hits - before == LAYERS + 1
    if experts_in_cache == LAYERS * EXPERTS:
        assert store.misses <= LAYERS * EXPERTS


def test_what_was_used_longest_ago_leaves_the_cache_first(folder):
    budget = 2 * LAYERS * EXPERT_BYTES
    store = AutoModelForCausalLM.from_pretrained(folder, experts_on="disk", expert_cache=budget).expert_store
    for chosen, kept in (([0, 1], [0, 1]), ([0], [1, 0]), ([5], [0, 5]), ([0, 5], [0, 5]), ([2, 5], [5, 2])):
        for _ in store.fetch(0, chosen, torch.device("cpu"), torch.float32):
            pass
        assert list(store.cache[0]) == kept
    assert (store.hits, store.misses) == (4, 4)


def test_reading_ahead_overlaps_the_next_expert_with_the_computation_of_this_one(folder, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(folder, experts_on="disk")
    store, started = model.expert_store, threading.Event()
    last = sorted(store.experts[0, 5])[-1]

    def watching(stored, buffer=None):
        if stored == store.experts[0, 5][last]:
            started.set()
        return read_tensor(stored, buffer)

    monkeypatch.setattr("modeling_grok1.offloading_grok1.read_tensor", watching)
    fetched = store.fetch(0, [1, 3, 5, 7], torch.device("cpu"), torch.float32)
    assert next(fetched)[0] == 1
    # Expert 1 is in hand and 3 and 5 are on their way, though nobody has asked for them yet; 7 would be too early.
    assert started.wait(10)
    assert store.misses == 3
    assert [expert for expert, _ in fetched] == [3, 5, 7]


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_for_a_device_with_memory_of_its_own_host_memory_is_reused(folder, monkeypatch, place):
    """On the meta device, which discards what is copied to it."""
    model, kept = AutoModelForCausalLM.from_pretrained(folder, experts_on=place), []
    store = model.expert_store
    read = ExpertStore.read
    monkeypatch.setattr(ExpertStore, "read", lambda *args: kept.append(read(*args)) or kept[-1])
    for layer in range(LAYERS):
        for expert, tensors in store.fetch(layer, range(EXPERTS), torch.device("meta"), torch.float32):
            assert {tensor.device.type for tensor in tensors.values()} == {"meta"}
            assert tensors["w2.weight"].shape == (64, 96)
            assert layer * EXPERTS + expert < len(kept)
    assert len(kept) == LAYERS * EXPERTS * 3
    # Those of the expert in hand and of the two that are read ahead.
    assert len({tensor.data_ptr() for tensor in kept}) <= 3 * (TOP_K + 1)


def test_reused_memory_holds_the_right_weights(folder):
    weights = load_file(folder / "model.safetensors")
    for place in ("cpu", "disk"):
        store = AutoModelForCausalLM.from_pretrained(folder, experts_on=place).expert_store
        for expert in (*range(EXPERTS), *range(EXPERTS)):
            for name, stored in store.experts[1, expert].items():
                tensor = store.read(stored, stage=True)
                assert torch.equal(tensor, weights[f"model.layers.1.block_sparse_moe.experts.{expert}.{name}"])
                store.staging.setdefault(stored.nbytes, []).append(tensor.view(-1).view(torch.uint8))
        assert sum(len(buffers) for buffers in store.staging.values()) == 1


@pytest.mark.parametrize("cache", [None, EXPERT_BYTES * LAYERS])
def test_threads_share_one_model(whole, folder, cache):
    model = AutoModelForCausalLM.from_pretrained(folder, experts_on="disk", expert_cache=cache)
    prompts = [prompt(12)[:, start : start + 4] for start in range(9)] * 3
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda ids: logits_of(model, ids), prompts))
    for ids, logits in zip(prompts, results, strict=True):
        torch.testing.assert_close(logits, logits_of(whole, ids), rtol=0, atol=1e-4)
    store = model.expert_store
    really = sum(t.nbytes for recent in store.cache.values() for tensors in recent.values() for t in tensors.values())
    assert really == store.cached_bytes <= store.cache_bytes


@pytest.mark.parametrize(
    ("auto", "output"),
    [
        (AutoModel, "last_hidden_state"),
        (AutoModelForSequenceClassification, "logits"),
        (AutoModelForTokenClassification, "logits"),
        (AutoModelForQuestionAnswering, "start_logits"),
    ],
)
def test_every_auto_class_takes_it(folder, auto, output):
    torch.manual_seed(3)
    whole = auto.from_pretrained(folder)
    torch.manual_seed(3)
    model, info = auto.from_pretrained(folder, experts_on="disk", output_loading_info=True)
    assert not [key for key in info["missing_keys"] if "experts" in key]
    assert info["unexpected_keys"] == set()
    with torch.no_grad():
        pair = (model(prompt(8))[output], whole(prompt(8))[output])
    torch.testing.assert_close(*pair, rtol=0, atol=1e-4)


def test_config_json_knows_nothing_of_it(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder, experts_on="disk", expert_cache="1MB")
    model.config.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert "expert_cache" not in text
    assert "experts_on" not in text
    assert '"model_type": "grok-1"' in text


def test_saving_half_a_model_is_refused_with_what_to_do(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder, experts_on="disk")
    with pytest.raises(ValueError, match=r"experts_on='disk'.*copy that folder") as refusal:
        model.save_pretrained(tmp_path)
    assert str(folder) in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


def shorten(path, keep_the_time=False):
    times = os.stat(path)
    os.truncate(path, 3000)
    if keep_the_time:
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (os.remove, "No such file"),
        (os.utime, "replaced"),
        (shorten, "replaced"),
        (partial(shorten, keep_the_time=True), "ends after"),
    ],
    ids=["removed", "replaced", "shortened", "shortened-unnoticed"],
)
def test_a_spoiled_file_gives_one_clear_error(sharded, tmp_path, spoil, reason):
    folder = shutil.copytree(sharded, tmp_path / "copy")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    with_other_weights = {file for name, file in index.items() if ".experts." not in name}
    only_experts = sorted(set(index.values()) - with_other_weights)
    model = AutoModelForCausalLM.from_pretrained(folder, experts_on="disk")
    for file in only_experts:
        spoil(folder / file)
    with pytest.raises(OSError, match=reason) as error:
        logits_of(model, prompt())
    message = str(error.value)
    assert any(str(folder / file) in message for file in only_experts)
    assert "block_sparse_moe.experts." in message
    assert "load the model again" in message


def test_a_checkpoint_that_lacks_experts_is_refused_before_anything_runs(folder, tmp_path):
    whole = AutoModelForCausalLM.from_pretrained(folder)
    whole.save_pretrained(tmp_path / "fused", save_original_format=False)
    with pytest.raises(ValueError, match=r"layer 0, expert 0, w1\.weight: missing.*and 86 more"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "fused", experts_on="disk")
    with pytest.raises(
        ValueError, match=r"layer 0, expert 0, w1\.weight: expected the shape \(80, 64\), found \(96, 64\)"
    ):
        AutoModelForCausalLM.from_pretrained(folder, experts_on="disk", intermediate_size=80)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts_on": "gpu"}, "`experts_on`: expected 'cpu' or 'disk', found 'gpu'"),
        ({"expert_cache": "1GB"}, "`expert_cache` keeps experts of `experts_on"),
        ({"experts_on": "disk", "expert_cache": "1 apple"}, "`expert_cache`: expected a size such as 5GB"),
        ({"experts_on": "disk", "experts_layout": "fused"}, "`experts_layout='fused'`"),
        ({"experts_on": "cpu", "quantization_config": BitsAndBytesConfig(load_in_4bit=True)}, "'bitsandbytes'"),
    ],
)
def test_options_that_do_not_go_together_are_refused_by_name(folder, options, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        AutoModelForCausalLM.from_pretrained(folder, **options)


def test_without_a_checkpoint_a_forward_says_where_experts_come_from():
    model = Grok1ForCausalLM(GrokConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                                        num_attention_heads=2, num_key_value_heads=1), experts_on="disk")  # fmt: skip
    with pytest.raises(ValueError, match="from_pretrained"):
        model(torch.ones(1, 1, dtype=torch.long))


@pytest.mark.parametrize(
    ("text", "size"), [("40GB", 40 * 10**9), ("1.5 gib", 3 * 2**29), (12, 12), ("7", 7), ("2MiB", 2**21)]
)
def test_sizes_are_decimal_or_binary_as_they_say(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("place", ["cpu", "disk"])
@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles_compute_the_same_with_a_store_of_their_own(folder, place, copy_of):
    model = AutoModelForCausalLM.from_pretrained(folder, experts_on=place, expert_cache=EXPERT_BYTES * LAYERS)
    expected = logits_of(model, prompt(6))
    again = copy_of(model)
    stores = {id(layer.block_sparse_moe.experts.store) for layer in again.model.layers} | {id(again.expert_store)}
    assert len(stores) == 1
    assert again.expert_store is not model.expert_store
    assert again.expert_store.cached_bytes == 0
    assert torch.equal(logits_of(again, prompt(6)), expected)
    assert again.expert_store.cached_bytes == EXPERT_BYTES * LAYERS
    assert torch.equal(logits_of(model, prompt(6)), expected)


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "5XB", "5 G B", "1e9", "0.1B"])
def test_what_is_no_size_is_refused_with_the_name_of_the_option(text):
    with pytest.raises(ValueError, match=r"`max_shard_size`: expected a size such as 5GB, 800MB or 4GiB, found"):
        parse_size(text, "max_shard_size")


def test_the_names_of_other_repositories_are_read_in_place_too(whole, folder, tmp_path):
    rename_as_hpcai(folder, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, experts_on="disk")
    assert any(".moe_block.experts.0.linear." in at.name for at in model.expert_store.experts[0, 0].values())
    torch.testing.assert_close(logits_of(model, prompt()), logits_of(whole, prompt()), rtol=0, atol=1e-4)

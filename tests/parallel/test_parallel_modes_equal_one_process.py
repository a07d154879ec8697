"""Tensor, expert, pipeline and data parallelism over real processes (gloo, on the CPU) give what one process gives."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_grok import LAYERS, prompt, rename_as_hpcai, save_small_grok
from transformers import AutoModelForCausalLM

from grok1.sizing.hardware import Gpus
from grok1.sizing.plan import make_plan
from grok1.sizing.request import Request
from modeling_grok1 import GrokConfig
from modeling_grok1.quantization_grok1 import Grok1Int8Config


# name -> (arguments of DistributedConfig, folder)
TWO = {
    "tp": ({"tp_size": 2}, "float32"),
    "ep": ({"fsdp_size": 2, "ep_size": 2}, "float32"),
    "tp-ep": ({"tp_size": 2, "ep_size": 2}, "float32"),
    "pp": ({"pp_size": 2}, "float32"),
    "fsdp": ({"fsdp_size": 2}, "float32"),
    "hpcai-tp": ({"tp_size": 2}, "hpcai"),
    "hpcai-tp-ep": ({"tp_size": 2, "ep_size": 2}, "hpcai"),
    "hpcai-pp": ({"pp_size": 2}, "hpcai"),
    "int8-tp": ({"tp_size": 2}, "int8"),
    "int8-ep": ({"fsdp_size": 2, "ep_size": 2}, "int8"),
    "int8-tp-ep": ({"tp_size": 2, "ep_size": 2}, "int8"),
    "int8-pp": ({"pp_size": 2}, "int8"),
    "int8-fsdp": ({"fsdp_size": 2}, "int8"),
}
FOUR = {
    "tp": ({"tp_size": 4}, "float32"),
    "ep": ({"fsdp_size": 4, "ep_size": 4}, "float32"),
    "tp-ep": ({"tp_size": 4, "ep_size": 4}, "float32"),
    "tp2-ep4": ({"tp_size": 2, "fsdp_size": 2, "ep_size": 4}, "float32"),
    "pp": ({"pp_size": 4}, "float32"),
    "fsdp": ({"fsdp_size": 4}, "float32"),
    "fsdp2-tp2": ({"fsdp_size": 2, "tp_size": 2}, "float32"),
    "int8-tp-ep": ({"tp_size": 4, "ep_size": 4}, "int8"),
}
FLOAT_MODES = [name for name, (_, folder) in TWO.items() if folder != "int8"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("parallel")
    folders = {"float32": save_small_grok(root / "float32")}
    folders["hpcai"] = rename_as_hpcai(folders["float32"], root / "hpcai")
    quantised = AutoModelForCausalLM.from_pretrained(
        folders["float32"], quantization_config=Grok1Int8Config(scale_blocks=8)
    )
    quantised.save_pretrained(root / "int8")
    return {**folders, "int8": root / "int8"}


@pytest.fixture(scope="module")
def one_process(folders):
    """folder -> logits, logits of a padded prompt, greedy tokens."""

    @torch.no_grad()
    def compute(folder):
        model, ids = AutoModelForCausalLM.from_pretrained(folder), prompt()
        padding = ids.new_zeros(1, 3)
        padded = torch.cat([padding, ids[:, :9]], dim=1)
        return {
            "logits": model(ids).logits,
            "padded": model(padded, attention_mask=(padded != 0).long()).logits,
            "greedy": model.generate(ids, max_new_tokens=16, do_sample=False, eos_token_id=None),
        }

    return {name: compute(folders[name]) for name in ("float32", "int8")}


def launch(modes, folders, out: Path, processes: int) -> list[dict]:
    """What each rank saw, from one launch of torchrun that goes through all modes."""
    job = {
        name: {"folder": str(folders[folder]), "distributed": distributed, "save": folder != "int8"}
        for name, (distributed, folder) in modes.items()
    }
    (out / "job.json").write_text(json.dumps({"out": str(out), "modes": job}))
    program = Path(__file__).parent / "run_modes.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    support = str(Path(__file__).parents[1] / "support")
    done = subprocess.run(
        [*command, str(program), str(out / "job.json")],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([support, os.environ.get("PYTHONPATH", "")]),
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(out / f"rank-{rank}.pt", weights_only=False) for rank in range(processes)]


@pytest.fixture(scope="module")
def two_out(tmp_path_factory):
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def two(folders, two_out):
    return launch(TWO, folders, two_out, 2)


@pytest.fixture(scope="module")
def four_out(tmp_path_factory):
    return tmp_path_factory.mktemp("four")


@pytest.fixture(scope="module")
def four(folders, four_out):
    return launch(FOUR, folders, four_out, 4)


def assert_equals_one_process(ranks, name, expected, distributed):
    pp = distributed.get("pp_size", 1)
    routed: dict[int, set[int]] = {}
    for rank in ranks:
        seen = rank[name]
        assert "error" not in seen, seen["error"]
        assert not any(seen["loading"].values())
        for key in ("logits", "padded"):
            torch.testing.assert_close(seen[key], expected[key], rtol=0, atol=1e-5)
        assert torch.equal(seen["greedy"], expected["greedy"])
        assert seen["tied"] is not False
        # A pipeline's rank routes in its own layers, every other rank in all of them.
        assert len(seen["routed"]) == LAYERS // pp
        assert all(experts == set(range(8)) for experts in seen["routed"].values())
        routed |= seen["routed"]
    assert set(routed) == set(range(LAYERS))


def assert_router_and_norms_are_float32(ranks, name, replicated):
    for rank in ranks:
        kept = {
            key: seen
            for key, seen in rank[name]["parameters"].items()
            if "block_sparse_moe.gate" in key or "norm.weight" in key
        }
        assert kept or "pp" in name
        for seen in kept.values():
            assert seen["dtype"] == torch.float32
            assert not replicated or seen["here"] == seen["whole"]


def assert_saved_is_the_checkpoint(saved: Path, folder: Path):
    original, again = (load_file(path / "model.safetensors") for path in (folder, saved))
    assert set(again) == set(original)
    assert all(again[name].dtype == original[name].dtype for name in original)
    assert [name for name in original if not torch.equal(again[name], original[name])] == []
    assert (saved / "config.json").read_text() == (folder / "config.json").read_text()


@pytest.mark.parametrize("name", TWO)
def test_two_processes_compute_what_one_does(two, one_process, name):
    distributed, folder = TWO[name]
    assert_equals_one_process(two, name, one_process["int8" if folder == "int8" else "float32"], distributed)


@pytest.mark.parametrize("name", TWO)
def test_router_and_norms_stay_float32_and_whole_on_two_ranks(two, name):
    assert_router_and_norms_are_float32(two, name, replicated="fsdp_size" not in TWO[name][0])


@pytest.mark.parametrize("name", FLOAT_MODES)
def test_two_processes_save_the_checkpoint_bit_for_bit(two, two_out, folders, name):
    assert_saved_is_the_checkpoint(two_out / f"saved-{name}", folders["float32"])


@pytest.mark.parametrize(
    ("name", "parameter", "whole", "here"),
    [
        ("tp", "self_attn.q_proj.weight", (128, 64), (64, 64)),
        ("tp", "self_attn.o_proj.weight", (64, 128), (64, 64)),
        ("tp", "block_sparse_moe.experts.gate_up_proj", (8, 192, 64), (8, 96, 64)),
        ("tp", "block_sparse_moe.experts.down_proj", (8, 64, 96), (8, 64, 48)),
        ("ep", "block_sparse_moe.experts.down_proj", (8, 64, 96), (4, 64, 96)),
        ("tp-ep", "self_attn.q_proj.weight", (128, 64), (64, 64)),
        ("tp-ep", "block_sparse_moe.experts.gate_up_proj", (8, 192, 64), (4, 192, 64)),
        ("int8-tp", "block_sparse_moe.experts.down_proj_scale", (8, 64, 24), (8, 64, 12)),
        ("int8-tp-ep", "block_sparse_moe.experts.down_proj_scale", (8, 64, 24), (4, 64, 24)),
        ("int8-tp", "self_attn.o_proj.weight_scale", (64, 32), (64, 16)),
    ],
)
def test_each_rank_holds_its_share_only(two, name, parameter, whole, here):
    for rank in two:
        seen = rank[name]["parameters"][f"model.layers.0.{parameter}"]
        assert (seen["whole"], seen["here"]) == (whole, here)


@pytest.mark.parametrize(
    ("name", "parallel", "precision"),
    # Not int8: the plan counts the release's groups of 128, and these matrices are narrower.
    [("tp", "tp", "float32"), ("tp-ep", "ep", "float32"), ("pp", "pp", "float32")],
)
def test_each_rank_holds_the_bytes_that_grok1_plan_said(two, folders, name, parallel, precision):
    config = GrokConfig.from_pretrained(folders["float32"])
    plan = make_plan(Request(config, Gpus(2, 1, 80 * 10**9), precision, context=64, parallel=parallel))
    for rank, share in zip(two, plan.shares, strict=True):
        # int8 was loaded in float32, for the logits: its embedding is twice as large as planned.
        held = sum(
            math.prod(seen["here"]) * (2 if precision == "int8" and "embed" in key else seen["dtype"].itemsize)
            for key, seen in rank[name]["parameters"].items()
        )
        assert share.weights == pytest.approx(held, rel=0.05)


def test_a_pipeline_rank_holds_its_layers_only(two):
    layers = [{int(key.split(".")[2]) for key in rank["pp"]["parameters"] if ".layers." in key} for rank in two]
    assert layers == [{0, 1}, {2, 3}]


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUR)
def test_four_processes_compute_what_one_does(four, four_out, folders, one_process, name):
    distributed, folder = FOUR[name]
    assert_equals_one_process(four, name, one_process[folder], distributed)
    assert_router_and_norms_are_float32(four, name, replicated="fsdp_size" not in distributed)
    if folder == "float32":
        assert_saved_is_the_checkpoint(four_out / f"saved-{name}", folders[folder])

"""What `mlx.launch` runs twice: python two_processes.py FOLDERS GOLDEN tensor|pipeline. Rank 0 prints JSON."""

import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model, sharded_load


folders, golden, kind = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
group = mx.distributed.init(strict=True)

# A golden checkpoint, of which each process keeps its part.
model, _ = load_model(folders / "tiny-8", lazy=True, trust_remote_code=True)
model.shard(group) if kind == "tensor" else model.model.pipeline(group)
(file,) = (golden / "tiny-8").glob("ref_fp32_*.npz")
reference = np.load(file)
ids, cache, errors, said = mx.array(reference["prompt"].astype(np.int32)), make_prompt_cache(model), [], []
for expected in reference["greedy_logits"]:
    logits = model(ids, cache)[:, -1]
    errors.append(float(np.abs(np.array(logits[0]) - expected).max()))
    ids = mx.argmax(logits, axis=-1)[:, None]
    said.append(ids.item())

# The packed demo as mlx_lm.server loads it, beside the whole one.
found = {"processes": group.size(), "error": max(errors), "greedy": int((np.array(said) == reference["greedy"]).sum())}
tokens = mx.array([[5, 77, 300, 12, 9, 41, 500, 8]])
groups = {"tensor_group" if kind == "tensor" else "pipeline_group": group}
for name in ("demo", "demo-int8-float32"):
    whole, _ = load_model(folders / name, trust_remote_code=True)
    part, _ = sharded_load(str(folders / name), **groups, trust_remote_code=True)
    found[name] = float(mx.abs(part(tokens, make_prompt_cache(part)) - whole(tokens)).max())
    held = [a for layer in part.layers for a in (layer.block_sparse_moe.switch_mlp.up_proj.weight,)]
    total = [a for layer in whole.layers for a in (layer.block_sparse_moe.switch_mlp.up_proj.weight,)]
    found[f"{name} share"] = sum(a.nbytes for a in held) / sum(a.nbytes for a in total)
if group.rank() == 0:
    print(json.dumps(found))

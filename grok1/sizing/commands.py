"""The code to paste that runs a plan."""

from __future__ import annotations

from grok1.sizing.request import Request


def python_command(request: Request, placement: str) -> str:
    """A Python program that loads the model with `placement` (arguments of `from_pretrained`) and generates."""
    row = request.row
    lines = ["import torch", "from transformers import AutoModelForCausalLM, AutoTokenizer"]
    options = [f"dtype=torch.{row.dtype}", placement]
    if row.on_load is not None:
        lines.append(f"from {row.on_load.module} import {row.on_load.name}")
        options.append(f"quantization_config={row.on_load.code}")
    lines += ["import modeling_grok1", ""]
    if row.converted == row.name != "bfloat16":
        lines.append(f"# a folder written by `grok1 convert --dtype {row.converted}`")
    lines += [
        f"folder = {request.folder!r}",
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        f"model = AutoModelForCausalLM.from_pretrained(folder, {', '.join(options)})",
        f'batch = tokenizer(["The answer to life"] * {request.batch}, return_tensors="pt").to(model.device)',
        f"tokens = model.generate(**batch, max_new_tokens=64, prefill_chunk_size={request.chunk})",
        "print(tokenizer.batch_decode(tokens, skip_special_tokens=True)[0])",
    ]
    return "\n".join(lines)


def run_command(request: Request, parallel: str) -> str:
    """The code for one way to run: a Python program for one process, torchrun for several."""
    gpus, count = request.gpus, request.gpus.count
    if parallel == "one":
        return python_command(request, "device_map=0")
    if parallel == "pp" and gpus.nodes == 1:
        layers = request.config.num_hidden_layers
        ends = f"'model.embed_tokens': 0, 'lm_head': 0, 'model.rotary_emb': 0, 'model.norm': {count - 1}"
        between = f"f'model.layers.{{i}}': i * {count} // {layers} for i in range({layers})"
        return python_command(request, f"device_map={{{ends}, **{{{between}}}}}")
    nodes = ""
    if gpus.nodes > 1:
        nodes = f"--nnodes {gpus.nodes} --rdzv-backend c10d --rdzv-id grok1 --rdzv-endpoint HOST:29500 "
    sizes = {"tp": f"--tp {count}", "ep": f"--tp {count} --ep {count}", "pp": f"--pp {count}"}[parallel]
    comment = ""
    if request.row.converted == request.row.name != "bfloat16":
        comment = f"# a folder written by `grok1 convert --dtype {request.row.converted}`\n"
    options = f"{sizes} --dtype {request.row.dtype} --prefill-chunk {request.chunk}"
    example = f"examples/generate_distributed.py {request.folder} {options}"
    return f'{comment}torchrun {nodes}--nproc-per-node {gpus.per_node} {example} "The answer to life"'

"""The code to paste that runs a plan."""

from __future__ import annotations

from grok1.sizing.hardware import GB
from grok1.sizing.request import Request


PROMPT = "The answer to life"


def folder_comment(request: Request) -> str:
    """How to make the folder of a precision that the conversion writes; empty for bfloat16."""
    row = request.row
    if row.converted != row.name or row.name == "bfloat16":
        return ""
    return f"# {request.folder} is written by `grok1 convert --dtype {row.converted}`\n"


def python_command(request: Request, placement: str) -> str:
    """A Python program that loads the model with `placement` (arguments of `from_pretrained`) and generates."""
    row = request.row
    lines = ["import torch", "from transformers import AutoModelForCausalLM, AutoTokenizer"]
    options = [f"dtype=torch.{row.dtype}", placement]
    if row.on_load is not None:
        lines.append(f"from {row.on_load.module} import {row.on_load.name}")
        options.append(f"quantization_config={row.on_load.code}")
    lines += [
        "import modeling_grok1",
        "",
        f"folder = {request.folder!r}",
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        f"model = AutoModelForCausalLM.from_pretrained(folder, {', '.join(options)})",
        f'batch = tokenizer(["{PROMPT}"] * {request.batch}, return_tensors="pt").to(model.device)',
        f"tokens = model.generate(**batch, max_new_tokens=64, prefill_chunk_size={request.chunk})",
        "print(tokenizer.batch_decode(tokens, skip_special_tokens=True)[0])",
    ]
    return folder_comment(request) + "\n".join(lines)


def offload_command(request: Request, place: str, budget: int) -> str:
    """Experts in host memory ("cpu") or on "disk", `budget` bytes of them cached on the GPU."""
    row = request.row
    cache = f" --expert-cache {budget // GB}GB" if budget >= GB else ""
    precision = f" --precision {row.name}" if row.on_load is not None else ""
    return (
        f'{folder_comment(request)}grok1 generate {request.folder} "{PROMPT}" --device-map cuda:0{precision} '
        f"--experts-on {place}{cache}"
    )


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
    options = f"{sizes} --dtype {request.row.dtype} --prefill-chunk {request.chunk}"
    launcher = f"-m grok1.distributed {request.folder} {options}"
    return f'{folder_comment(request)}torchrun {nodes}--nproc-per-node {gpus.per_node} {launcher} "{PROMPT}"'


def vllm_command(request: Request) -> str | None:
    """The line that serves the folder with vLLM; None where vLLM does not read the precision.

    Tensor parallel within a machine, pipeline parallel over machines, which Ray connects first.
    """
    gpus = request.gpus
    if not request.row.engines:
        return None
    tensor = f" --tensor-parallel-size {gpus.per_node}" if gpus.per_node > 1 else ""
    line = f"vllm serve {request.folder}{tensor} --max-model-len {request.context}"
    if gpus.nodes == 1:
        return line
    head = "ray start --head --port 6379                # on the first machine"
    others = "ray start --address HOST:6379               # on the others"
    return "\n".join(
        [head, others, f"{line} --pipeline-parallel-size {gpus.nodes} --distributed-executor-backend ray"]
    )

"""Whether the card computes what the golden data, float32 and the plain products say."""

import importlib.util
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from grok1.conversion.convert import convert
from modeling_grok1 import Grok1ForCausalLM, modeling_grok1
from modeling_grok1.experts_grok1 import Grok1LinearExperts, geglu
from modeling_grok1.quantized_grok1 import QuantizedExperts, dequantise

from .models import fill, grok_config, random_grok, release
from .results import NotHereError, Run
from .tuned import kernel_module, random_product


ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "fixtures" / "golden"
TOLERANCE = 1e-4  # of float32 logits, as in the tests of the golden data


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.float() - expected.float()).norm() / expected.float().norm()).item()


# --------------------------------------------------------------------------------------------------------------------
# Golden data
# --------------------------------------------------------------------------------------------------------------------
def reference(name: str, precision: str) -> dict[str, torch.Tensor]:
    """xAI's own outputs: tokens, logits, prompt, greedy, greedy_logits."""
    (file,) = (GOLDEN / name).glob(f"ref_{precision}_*.npz")
    arrays = np.load(file)
    kinds = {key: np.float32 if "logits" in key else np.int64 for key in arrays.files}
    return {key: torch.from_numpy(arrays[key].astype(kinds[key])) for key in kinds if arrays[key].ndim}


@contextmanager
def converted(name: str, dtype: str) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        convert(GOLDEN / name, Path(folder, "converted"), dtype=dtype, no_tokenizer=True)
        yield str(Path(folder, "converted"))


def golden_logits(model: Any, data: dict[str, torch.Tensor]) -> torch.Tensor:
    tokens = data["tokens"].to(model.device)
    return model(tokens, attention_mask=(tokens != 0).long()).logits.float().cpu()


@torch.no_grad()
def golden(run: Run) -> None:
    ours, theirs = [], []
    for name in ("tiny-1",) if run.dry else ("tiny-1", "tiny-8"):
        data = reference(name, "fp32")
        with run.attempt(f"{name}, float32"), converted(name, "float32") as folder:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(run.device)
            error = (golden_logits(model, data) - data["logits"]).abs().max().item()
            run.holds(f"{name}, float32", error <= TOLERANCE, f"largest error of a logit {error:.1e}, at most 1e-4")
            prompt = data["prompt"].to(run.device)
            output = model.generate(prompt, max_new_tokens=20, do_sample=False, eos_token_id=None)
            same = output[0, prompt.shape[1] :].tolist() == data["greedy"].tolist()
            run.holds(f"{name}, greedy tokens", same, "the 20 tokens of xAI's own decoding")
        with run.attempt(f"{name}, bf16"), converted(name, "bfloat16") as folder:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(run.device)
            ours.append((golden_logits(model, data) - data["logits"]).flatten())
            theirs.append((reference(name, "bf16")["logits"] - data["logits"]).flatten())
    with run.attempt("bf16"):
        ratio = (torch.cat(ours).square().mean() / torch.cat(theirs).square().mean()).sqrt().item()
        run.holds("bf16", ratio <= 3, f"{ratio:.2f} x the error of xAI's own bfloat16, at most 3")


# --------------------------------------------------------------------------------------------------------------------
# The Triton kernel against the plain product
# --------------------------------------------------------------------------------------------------------------------
COUNTS = {
    "two experts, a row each": [0, 1, 0, 0, 0, 1, 0, 0],
    "odd rows and empty experts": [17, 0, 33, 1, 0, 129, 0, 7],
    "the last expert only": [0, 0, 0, 0, 0, 0, 0, 5],
    "a prompt": [301, 500, 212, 256, 255, 257, 0, 267],
}


@torch.no_grad()
def kernels(run: Run) -> None:
    matmul = kernel_module().quantised_grouped_matmul
    sizes = run.sizes
    matrices = {
        "gate and up": (2 * sizes.intermediate, sizes.hidden, 1),
        "down": (sizes.hidden, sizes.intermediate, sizes.scale_blocks),
    }
    for bits in (8, 4):
        for matrix, (outputs, inputs, blocks) in matrices.items():
            blocks = blocks if bits == 8 else inputs // sizes.group_size
            # One weight of more than 2^31 elements for all numbers of rows.
            _, weight, scale, _ = random_product(run, bits, [0] * 8, outputs, inputs, blocks)
            for case, counts in COUNTS.items():
                name = f"int{bits}, {matrix}: {case}"
                counts = [min(count, 6) for count in counts] if run.dry else counts
                with run.attempt(name):
                    x = torch.randn(sum(counts), inputs, device=run.device).to(sizes.dtype)
                    offsets = torch.tensor(counts, device=run.device).cumsum(0, dtype=torch.int32)
                    error = kernel_error(matmul(x, weight, scale, offsets), x, weight, scale, counts)
                    limit = 1e-5 if sizes.dtype == torch.float32 else 2**-7
                    run.holds(name, error <= limit, f"relative error {error:.1e}, at most {limit:.1e}")
            del weight, scale
            run.free()


def kernel_error(
    y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, counts: list[int]
) -> float:
    """The largest relative error of an expert's rows against the float32 product with the dequantised weight."""
    start, errors = 0, []
    for e, count in enumerate(counts):
        if count:
            matrix = dequantise(weight[e], scale[e], x.dtype)
            expected = F.linear(x[start : start + count].float(), matrix.float())
            errors.append(relative_error(y[start : start + count], expected))
        start += count
    return max(errors)


# --------------------------------------------------------------------------------------------------------------------
# Experts and attention
# --------------------------------------------------------------------------------------------------------------------
def expected_experts(x: torch.Tensor, chosen: torch.Tensor, gates: torch.Tensor, module: Any) -> torch.Tensor:
    """The formula in float32, one expert at a time."""
    output = torch.zeros(x.shape, device=x.device)
    for e in range(8):
        token, slot = torch.where(chosen == e)
        if len(token):
            gate_up, down = (matrix.float() for matrix in matrices_of(module, e))
            gate, up = F.linear(x[token].float(), gate_up).chunk(2, dim=-1)
            output.index_add_(0, token, F.linear(geglu(gate, up), down) * gates[token, slot, None].float())
    return output


def routed(run: Run, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, chosen experts (1, 2, 5 and 7: the others stay empty) and gates."""
    x = torch.randn(rows, run.sizes.hidden, device=run.device).bfloat16()
    gates, slots = torch.rand(rows, 4, device=run.device).softmax(-1).topk(2)
    return x, torch.tensor([1, 2, 5, 7], device=run.device)[slots], gates.bfloat16()


@torch.no_grad()
def experts(run: Run) -> None:
    rows = {"one row": 1, "odd rows": 7, "a prompt": 33 if run.dry else 513}
    for precision in ("bf16", "int8", "int4"):
        model = random_grok(run.sizes, precision, run.device, layers=1)
        module = model.model.layers[0].block_sparse_moe.experts
        implementations = ["grok1", "eager", "grouped_mm", "batched_mm", "linear"] if precision == "bf16" else [""]
        for implementation in implementations:
            for case, count in rows.items():
                if implementation == "batched_mm" and case == "a prompt" and not run.dry:
                    continue  # copies the experts of every token
                name = " ".join(word for word in (precision, implementation) if word) + f": {case}"
                with run.attempt(name):
                    x, chosen, gates = routed(run, count)
                    expected = expected_experts(x, chosen, gates, module)
                    actual = experts_by(model, module, implementation)(x, chosen, gates)
                    error = relative_error(actual, expected)
                    run.holds(name, error <= 2**-6, f"relative error {error:.1e}, at most 1.6e-02")
        del model, module
        release(run.device)


def matrices_of(module: Any, e: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The gate and up, and the down matrix of an expert as they are multiplied."""
    if not isinstance(module, QuantizedExperts):
        return module.gate_up_proj[e], module.down_proj[e]
    dtype = torch.bfloat16
    pairs = ((module.gate_up_proj, module.gate_up_proj_scale), (module.down_proj, module.down_proj_scale))
    gate_up, down = (dequantise(weight[e], scale[e], dtype) for weight, scale in pairs)
    return gate_up, down


def experts_by(model: Any, module: Any, implementation: str) -> Callable:
    if implementation == "linear":
        with torch.device("meta"):
            linear = Grok1LinearExperts(model.config)
        for e, expert in enumerate(linear):  # views of the same memory
            gate, up = module.gate_up_proj[e].chunk(2)
            for name, weight in (("w1", gate), ("w3", up), ("w2", module.down_proj[e])):
                getattr(expert, name).weight = torch.nn.Parameter(weight, requires_grad=False)
        return linear.eval()
    if implementation:
        model.set_experts_implementation(implementation)
    return module


@torch.no_grad()
def attention(run: Run) -> None:
    """Each implementation against float32 with the cap, on scores far above 30: it must be much nearer than what
    the model gives without the cap."""
    sizes = run.sizes
    config = grok_config(sizes, 1, vocab_size=512, intermediate_size=max(64, sizes.hidden // 8))
    with torch.device("meta"):
        model = Grok1ForCausalLM(config)
    fill(model, run.device, torch.float32)
    block = model.model.layers[0].self_attn
    for projection in (block.q_proj, block.k_proj):  # scores of standard deviation 40
        projection.weight.normal_(std=(40 / sizes.hidden) ** 0.5)
    tokens = torch.randint(3, 512, (2, 40 if run.dry else 500), device=run.device)
    mask = torch.ones_like(tokens)
    mask[0, :9] = 0
    real = mask.bool()

    outputs: list[torch.Tensor] = []
    block.register_forward_hook(lambda module, inputs, output: outputs.append(output[0]))

    def attended(implementation: str) -> torch.Tensor:
        model.set_attn_implementation(implementation)
        model(tokens, attention_mask=mask)
        return outputs.pop().float()[real]

    expected = attended("eager")
    with mock.patch.object(modeling_grok1, "soft_cap", lambda scores, cap: scores):
        distance = relative_error(attended("eager"), expected)
    run.value("without the cap", distance, "relative error", "how far the output is from the right one")
    model.to(torch.bfloat16)
    for implementation in ("eager", "flex_attention", "flash_attention_2", "sdpa"):
        with run.attempt(f"{implementation}, bf16"):
            if implementation == "flash_attention_2" and not flash_attention_is_here():
                raise NotHereError("flash_attn is not installed")
            if implementation == "sdpa":
                run.holds("sdpa is refused", is_refused(model), "it has no cap")
                continue
            with torch.compiler.set_stance("force_eager" if run.dry else "default"):
                error = relative_error(attended(implementation), expected)
            detail = f"relative error {error:.1e}, at most a quarter of that without the cap"
            run.holds(f"{implementation}, bf16", error <= distance / 4, detail)


def flash_attention_is_here() -> bool:
    from transformers.utils import is_flash_attn_2_available

    return is_flash_attn_2_available()


def is_refused(model: Any) -> bool:
    try:
        model.set_attn_implementation("sdpa")
    except ValueError:
        return True
    return False


# --------------------------------------------------------------------------------------------------------------------
# Generation and training
# --------------------------------------------------------------------------------------------------------------------
def gap(model: Any, sequence: torch.Tensor, start: int) -> float:
    """How far the generated tokens are below the best of one forward pass, in standard deviations of its logits:
    in bfloat16 the order of sums may choose another of two nearly equal tokens."""
    logits = model(sequence[:, :-1]).logits[:, start - 1 :].float()
    found = logits.gather(-1, sequence[:, start:, None])[..., 0]
    return ((logits.amax(-1) - found) / logits.std(-1)).max().item()


@torch.no_grad()
def generation(run: Run) -> None:
    from transformers import CompileConfig, ContinuousBatchingConfig, GenerationConfig

    compiled = CompileConfig(backend="eager") if run.dry else CompileConfig(fullgraph=True, mode="reduce-overhead")
    compiled._compile_all_devices = True  # type: ignore[attr-defined]
    ways = {
        "dynamic cache": {},
        "static cache": {"cache_implementation": "static", "disable_compile": True},
        "compiled, reduce-overhead": {"cache_implementation": "static", "compile_config": compiled},
    }
    new, length = (4, 6) if run.dry else (16, 24)
    for precision in ("bf16", "int8"):
        model = random_grok(run.sizes, precision, run.device, layers=1 if run.dry else 2)
        prompt = torch.randint(5, run.sizes.vocabulary, (1, length), device=run.device)
        options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "eos_token_id": None}
        for way, more in ways.items():
            with run.attempt(f"{precision}, {way}"):
                found = gap(model, model.generate(prompt, **options, **more), length)
                run.holds(
                    f"{precision}, {way}", found <= 0.15, f"tokens at most {found:.3f} deviations below the best"
                )
        with run.attempt(f"{precision}, generate_batch"):
            prompts = [prompt[0, :count].tolist() for count in (3, length)]
            outputs = model.generate_batch(
                prompts,
                generation_config=GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1),
                continuous_batching_config=ContinuousBatchingConfig(
                    page_size=16, num_blocks=64, max_batch_tokens=64, use_cuda_graph=False
                ),
                progress_bar=False,
            )
            for output in outputs.values():
                tokens = torch.tensor([[*output.prompt_ids, *output.generated_tokens]], device=run.device)
                found = gap(model, tokens, len(output.prompt_ids))
                name = f"{precision}, generate_batch, prompt of {len(output.prompt_ids)}"
                run.holds(name, found <= 0.15, f"tokens at most {found:.3f} deviations below the best")
        del model
        torch.compiler.reset()  # compiled code keeps the memory of its CUDA graphs
        release(run.device)


def training(run: Run) -> None:
    """Two steps of LoRA on a frozen int8 model."""
    with run.attempt("LoRA on int8"):
        try:
            import peft
        except ImportError as error:
            raise NotHereError(error) from error
        base = random_grok(run.sizes, "int8", run.device, layers=1 if run.dry else 2)
        frozen = {name: weight.flatten()[:4096].clone() for name, weight in base.named_parameters()}
        targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
        model = peft.get_peft_model(base, peft.LoraConfig(r=8, task_type="CAUSAL_LM", target_modules=targets))
        model.train()
        learned = [weight for weight in model.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(learned, lr=1e-3)
        tokens = torch.randint(5, run.sizes.vocabulary, (1, 16 if run.dry else 512), device=run.device)

        def step() -> float:
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.item()

        losses = [step() for _ in range(4)]
        run.holds("the loss falls", losses[-1] < losses[0], ", ".join(f"{loss:.4f}" for loss in losses))
        run.value("a step", run.seconds(step, 2, 0) * 1e3, "ms", f"{tokens.numel()} tokens, {count(learned)} learned")
        weights = dict(model.unload().named_parameters())
        same = all(torch.equal(weights[name].flatten()[:4096], part) for name, part in frozen.items())
        run.holds("frozen weights stay as they are", same, f"{len(frozen)} weights")


def count(parameters: list[torch.nn.Parameter]) -> str:
    return f"{sum(parameter.numel() for parameter in parameters):,}"


# --------------------------------------------------------------------------------------------------------------------
# Placement, other quantisers, processes
# --------------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def placement(run: Run) -> None:
    data = reference("tiny-1", "fp32")
    first: Any = 0 if run.device.type == "cuda" else "cpu"
    rest = "cpu" if first == 0 else "disk"
    with converted("tiny-1", "float32") as folder, tempfile.TemporaryDirectory() as spill:
        size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        memory: dict[Any, int] = {first: int(size * 0.7)} | ({"cpu": size * 10} if first == 0 else {})
        ways: dict[str, dict[str, Any]] = {
            "experts_on='cpu'": {"experts_on": "cpu", "device_map": {"": first}},
            "device_map with max_memory": {"device_map": "auto", "max_memory": memory, "offload_folder": spill},
        }
        for name, options in ways.items():
            with run.attempt(name):
                model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
                tokens = data["tokens"].to(run.device)
                logits = model(tokens, attention_mask=(tokens != 0).long()).logits.float().cpu()
                error = (logits - data["logits"]).abs().max().item()
                places = {str(place) for place in getattr(model, "hf_device_map", {}).values()}
                spread = "experts_on" in options or places == {str(first), rest}
                detail = f"largest error of a logit {error:.1e}; on {', '.join(sorted(places)) or run.device}"
                run.holds(name, error <= TOLERANCE and spread, detail)


def quantisers() -> dict[str, Callable[[], Any]]:
    """Configurations of libraries, each made when it is asked for: its library may be absent."""
    from transformers import BitsAndBytesConfig, FineGrainedFP8Config, TorchAoConfig

    def torchao(kind: str) -> Any:
        import torchao.quantization

        return TorchAoConfig(getattr(torchao.quantization, kind)())

    return {
        "bitsandbytes, 4 bits": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        "bitsandbytes, 8 bits": lambda: BitsAndBytesConfig(load_in_8bit=True),
        "torchao, int8": lambda: torchao("Int8WeightOnlyConfig"),
        "torchao, float8": lambda: torchao("Float8WeightOnlyConfig"),
        "fp8": FineGrainedFP8Config,
    }


@torch.no_grad()
def other_quantisers(run: Run) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 4}
    sizes |= {"head_dim": 64, "vocab_size": 512}
    model = random_grok(run.sizes, "bf16", run.device, layers=2, **sizes)
    tokens = torch.randint(5, 512, (2, 32), device=run.device)
    expected = model(tokens).logits.float()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for name, config in quantisers().items():
            with run.attempt(name):
                if name == "fp8" and run.device.type != "cuda":
                    raise NotHereError("no CUDA")
                try:
                    quantized = AutoModelForCausalLM.from_pretrained(
                        folder, dtype=torch.bfloat16, quantization_config=config(), device_map={"": run.device}
                    )
                    logits = quantized(tokens).logits  # fp8 asks for the package `kernels` only here
                except ImportError as error:
                    raise NotHereError(error) from error
                error = relative_error(logits, expected)
                # Random networks amplify rounding; unrelated outputs have an error of 1.4.
                run.holds(name, error <= 0.7, f"relative error of the logits {error:.2f}, at most 0.7")


RANK = """
import sys, torch, torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
import modeling_grok1
folder, backend = sys.argv[1:]
dist.init_process_group(backend)
if backend == "nccl":
    torch.cuda.set_device(0)
    dist.all_reduce(torch.ones(1, device="cuda"))
parallel = DistributedConfig(tp_size=2)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, distributed_config=parallel)
tokens = torch.arange(3, 15)[None].to(model.device)
with torch.no_grad():
    logits = model(tokens).logits
if dist.get_rank() == 0:
    torch.save(logits.cpu(), folder + "/logits.pt")
dist.destroy_process_group()
"""


@torch.no_grad()
def two_processes(run: Run) -> None:
    """Tensor parallelism of two processes on one card, which NCCL may refuse."""
    name, backend = "tensor parallelism of 2 processes", "nccl" if run.device.type == "cuda" else "gloo"
    with run.attempt(name), converted("tiny-1", "float32") as folder:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
        processes = [
            subprocess.Popen(
                [sys.executable, "-P", "-c", RANK, folder, backend],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env={**os.environ, **common, "RANK": rank, "LOCAL_RANK": "0"},  # both on the one card
            )
            for rank in "01"
        ]
        try:
            limit = time.monotonic() + max(5.0, run.seconds_left() - 5)
            output = "".join(p.communicate(timeout=max(1.0, limit - time.monotonic()))[0] for p in processes)
        finally:
            for process in processes:
                process.kill()
        if any(process.returncode != 0 for process in processes):
            refused = [line for line in output.splitlines() if "Duplicate GPU" in line or "invalid device" in line]
            if refused:
                raise NotHereError(f"two ranks on one card are refused: {refused[0].strip()[:200]}")
            errors = [line for line in output.splitlines() if "Error" in line]
            raise RuntimeError((errors or output.splitlines() or ["no output"])[0][:400])
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        expected = model(torch.arange(3, 15)[None]).logits
        error = (torch.load(f"{folder}/logits.pt") - expected).abs().max().item()
        run.holds(name, error <= TOLERANCE, f"largest difference of a logit {error:.1e}, {backend}")


def tests_marked_gpu(run: Run) -> None:
    """pytest's own verdict on the files with tests for an accelerator; a dry run collects them only."""
    with run.attempt("pytest -m gpu"):
        files = [str(file) for file in sorted(ROOT.glob("tests/*/*.py")) if "mark.gpu" in file.read_text()]
        files = files[:1] if run.dry else files
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        if importlib.util.find_spec("pytest") is None:
            raise NotHereError("pytest is not installed")
        words = [sys.executable, "-m", "pytest", "-m", "gpu", *files, *(["--collect-only"] if run.dry else [])]
        words += ["-p", "no:hypothesispytest"]  # seconds of imports that these tests do not need
        limit = max(5.0, run.seconds_left() - 5)
        ended = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=limit)
        last = (ended.stdout.strip().splitlines() or [ended.stderr[-300:]])[-1]
        run.holds("pytest -m gpu", ended.returncode == 0, last)

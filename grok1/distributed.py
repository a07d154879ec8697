"""Generate text on several GPUs of one or more machines; rank 0 streams it to standard output.

One machine with eight GPUs, tensor parallel (add `--ep 8` for one whole expert of each layer per GPU):

    torchrun --nproc-per-node 8 -m grok1.distributed grok-1-hf --tp 8 "The answer to life"

Two machines; run the same command on both, HOST is the name of either:

    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-id grok1 --rdzv-endpoint HOST:29500 \\
        -m grok1.distributed grok-1-hf --pp 16 "The answer to life"

Without GPUs it uses gloo on the CPU. The product of --tp, --pp and --fsdp is the number of processes. If a process
dies or stops responding, all others exit with an error after at most --timeout seconds.
"""

from __future__ import annotations

import argparse
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from transformers import TextStreamer
from transformers.distributed import DistributedConfig

from grok1.loading import check_folder, load_tokenizer
from modeling_grok1 import Grok1ForCausalLM


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="torchrun --nproc-per-node N -m grok1.distributed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="FOLDER", help="a converted folder, at the same path on every machine")
    parser.add_argument("prompt", metavar="PROMPT", help="text to continue")
    parser.add_argument("--tp", type=int, default=1, help="tensor parallel size: each process has a share of a matrix")
    parser.add_argument("--ep", type=int, default=1, help="expert parallel size: each process has whole experts")
    parser.add_argument("--pp", type=int, default=1, help="pipeline parallel size: each process has some layers")
    parser.add_argument("--fsdp", type=int, default=1, help="FSDP size: layers are gathered before use")
    parser.add_argument("--dtype", default="bfloat16", help="compute dtype")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="generate at most this many tokens")
    parser.add_argument("--prefill-chunk", type=int, default=512, help="prompt tokens processed at a time")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy decoding")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling, the same in every process")
    parser.add_argument("--timeout", type=float, default=600, help="seconds to wait for an unresponsive process")
    args = parser.parse_args()
    if "LOCAL_RANK" not in os.environ:
        parser.error("expected to be started by torchrun: torchrun --nproc-per-node N -m grok1.distributed ...")
    return args


def main() -> None:
    args = arguments()
    local_rank = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
    # Before from_pretrained, which would initialise the group with a timeout of ten minutes or more.
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(seconds=args.timeout))
    first = dist.get_rank() == 0

    check_folder(args.folder)
    tokenizer = load_tokenizer(args.folder)
    model = Grok1ForCausalLM.from_pretrained(
        args.folder,
        dtype=args.dtype,
        distributed_config=DistributedConfig(tp_size=args.tp, ep_size=args.ep, pp_size=args.pp, fsdp_size=args.fsdp),
    )
    inputs = tokenizer(args.prompt, return_tensors="pt").to(model.device)
    torch.manual_seed(args.seed)
    sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature > 0 else {"do_sample": False}
    model.generate(
        **inputs,
        **sampling,
        max_new_tokens=args.max_new_tokens,
        prefill_chunk_size=args.prefill_chunk,
        streamer=TextStreamer(tokenizer) if first else None,
    )
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""Generate on many GPUs, of one machine or of several, and stream the text from the first process.

One machine with eight GPUs, every matrix cut in eight (or with `--ep 8` added, one expert of each layer on each GPU):

    torchrun --nproc-per-node 8 examples/generate_distributed.py grok-1-hf --tp 8 "The answer to life"

Two machines; run the same on both, HOST is the name of either:

    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-id grok1 --rdzv-endpoint HOST:29500 \
        examples/generate_distributed.py grok-1-hf --pp 16 "The answer to life"

Without GPUs it runs over gloo on the CPU. The product of --tp, --pp and --fsdp is the number of processes. If one of
them dies or stops answering, every other one ends with an error after at most --timeout seconds.
"""

import argparse
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from transformers import AutoTokenizer, TextStreamer
from transformers.distributed import DistributedConfig

from modeling_grok1 import Grok1ForCausalLM


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="a converted folder, the same on every machine")
    parser.add_argument("prompt")
    parser.add_argument("--tp", type=int, default=1, help="processes that share every head and expert")
    parser.add_argument("--ep", type=int, default=1, help="processes that share the experts of a layer, each whole")
    parser.add_argument("--pp", type=int, default=1, help="processes that share the layers")
    parser.add_argument("--fsdp", type=int, default=1, help="processes that gather each layer before they use it")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--prefill-chunk", type=int, default=512, help="tokens of the prompt that are read at a time")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling, the same in every process")
    parser.add_argument(
        "--timeout", type=float, default=600, help="seconds to wait for a process that does not answer"
    )
    return parser.parse_args()


def main() -> None:
    args = arguments()
    local_rank = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
    # Before from_pretrained, which would set up the processes with a timeout of ten minutes or more.
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(seconds=args.timeout))
    first = dist.get_rank() == 0

    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    model = Grok1ForCausalLM.from_pretrained(
        args.folder,
        dtype=args.dtype,
        distributed_config=DistributedConfig(tp_size=args.tp, ep_size=args.ep, pp_size=args.pp, fsdp_size=args.fsdp),
    )
    inputs = tokenizer(args.prompt, return_tensors="pt").to(model.device)
    torch.manual_seed(args.seed)
    sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature > 0 else {"do_sample": False}
    model.generate(  # type: ignore[misc]
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

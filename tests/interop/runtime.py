"""llama.cpp's converter and runtime, with their defaults written out."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from environment import CONVERTER
from llama_cpp import GGML_TYPE_F16, GGML_TYPE_F32, Llama


CACHE_TYPES = {torch.float32: GGML_TYPE_F32, torch.float16: GGML_TYPE_F16}


def run_converter(folder: Path, gguf: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """convert_hf_to_gguf.py FOLDER --outfile GGUF OPTIONS, with its output captured."""
    command = [sys.executable, str(CONVERTER), str(folder), "--outfile", str(gguf), *options]
    return subprocess.run(command, capture_output=True, text=True)


class Runtime:
    """
    A GGUF file in llama.cpp, on one core of the CPU.

    Args:
        gguf: the file.
        cache: how keys and values are kept. llama.cpp's own default is float16.
        context: tokens that fit.
    """

    def __init__(self, gguf: Path, cache: torch.dtype = torch.float32, context: int = 512):
        self.llama = Llama(
            str(gguf),
            n_ctx=context,
            n_batch=context,
            n_threads=1,
            n_threads_batch=1,
            logits_all=True,
            type_k=CACHE_TYPES[cache],
            type_v=CACHE_TYPES[cache],
            verbose=False,
        )

    def logits(self, ids: list[int]) -> torch.Tensor:
        """All logits of one sequence, T V in float32."""
        self.llama.reset()
        self.llama.eval(ids)
        return torch.from_numpy(np.array(self.llama.scores[: len(ids)]))

    def greedy(self, prompt: list[int], steps: int) -> list[int]:
        """The `steps` tokens after `prompt`, each the likeliest, decoded one by one with llama.cpp's cache."""
        self.llama.reset()
        self.llama.eval(prompt)
        said: list[int] = []
        for _ in range(steps):
            said.append(int(np.argmax(self.llama.scores[self.llama.n_tokens - 1])))
            self.llama.eval(said[-1:])
        return said

"""llama.cpp, timed from another process: `bench_speed.py` starts this in the environment of `make interop`.

Reads lines `decode PROMPT STEPS` and `prefill TOKENS PROMPTS` from stdin and answers each with seconds: the median
step and the median prompt.
"""

import ctypes
import statistics
import sys
import time
from pathlib import Path

import llama_cpp


CLOCK = time.process_time if sys.argv[4:] == ["cpu"] else time.perf_counter


def silent(level, text, data):
    """Discards the runtime's log, which would be mixed with the answers."""


class Session:
    def __init__(self, path: Path, threads: int, context: int):
        self.log = llama_cpp.llama_log_callback(silent)
        llama_cpp.llama_log_set(self.log, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_default_params()
        model.use_mmap = False
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), model)
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = context
        options.n_threads = options.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, options)

    def feed(self, tokens: list[int], position: int) -> float:
        """Seconds for these tokens, logits of the last one."""
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position + i, 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = i == len(tokens) - 1
        begin = CLOCK()
        status = llama_cpp.llama_decode(self.context, batch)
        llama_cpp.llama_synchronize(self.context)
        seconds = CLOCK() - begin
        llama_cpp.llama_batch_free(batch)
        assert status == 0
        return seconds

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def decode(self, prompt: int, steps: int) -> float:
        self.clear()
        self.feed(list(range(5, 5 + prompt)), 0)
        return statistics.median(self.feed([5 + 37 * i % 8000], prompt + i) for i in range(steps))

    def prefill(self, tokens: int, prompts: int) -> float:
        seconds = []
        for first in range(5, 5 + prompts):
            self.clear()
            seconds.append(self.feed([first + 31 * i % 8000 for i in range(tokens)], 0))
        return statistics.median(seconds)


def main() -> None:
    session = Session(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    for line in sys.stdin:
        name, *numbers = line.split()
        print(getattr(session, name)(*map(int, numbers)), flush=True)


if __name__ == "__main__":
    main()

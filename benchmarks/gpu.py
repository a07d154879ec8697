"""Checks, measures and tunes Grok-1 on one accelerator in at most eight minutes: `make gpu`.

    python benchmarks/gpu.py --out DIR [--dry] [--parts 'NAME;NAME'] [--limit SECONDS]

The parts run in order, the most valuable first, in a worker process. Each has a time limit; a part that exceeds it, or
whose worker dies, is cut, and the next one runs in a new worker. DIR/results.jsonl has every result the moment it
exists; DIR/report.md and DIR/report.json are written again after each part. Models are built on the card from random
numbers, with the layers of the release. `--dry` takes the same steps with tiny sizes on the CPU, and Triton's
interpreter: it proves that the command works, and its figures mean nothing.
"""

import argparse
import contextlib
import importlib
import importlib.metadata
import json
import os
import platform
import selectors
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).parent))  # absent where Python's safe path is asked for

from gpu_parts.report import write_report


# Name -> module and function below gpu_parts, and seconds. The most valuable first: the total limit cuts the last.
PARTS = {
    "card": ("fast", "card", 30),
    "golden": ("correct", "golden", 40),
    "kernels": ("correct", "kernels", 60),
    "speed of bf16": ("fast", "speed_of_bf16", 45),
    "speed of int8": ("fast", "speed_of_int8", 60),
    "speed of int4": ("fast", "speed_of_int4", 60),
    "tiles of decoding, int8": ("tuned", "decoding_int8", 40),
    "tiles of decoding, int4": ("tuned", "decoding_int4", 40),
    "experts": ("correct", "experts", 30),
    "attention": ("correct", "attention", 60),
    "generation": ("correct", "generation", 90),
    "tiles of prompts, int8": ("tuned", "prompts_int8", 30),
    "tiles of prompts, int4": ("tuned", "prompts_int4", 30),
    "training": ("correct", "training", 30),
    "placement": ("correct", "placement", 30),
    "speed of mixtral": ("fast", "speed_of_mixtral", 30),
    "other quantisers": ("correct", "other_quantisers", 45),
    "two processes": ("correct", "two_processes", 40),
    "tests marked gpu": ("correct", "tests_marked_gpu", 60),
}
STARTING_LIMIT = 90  # seconds in which a worker must have imported its libraries


# --------------------------------------------------------------------------------------------------------------------
# The worker: reads a part per line, answers with a result per line
# --------------------------------------------------------------------------------------------------------------------
def about_this_machine(dry: bool) -> dict[str, Any]:
    import torch
    import transformers

    about: dict[str, Any] = {
        "dry": dry,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    for name in ("triton", "flash_attn", "bitsandbytes", "torchao", "kernels", "peft"):
        try:
            about[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            about[name] = "not installed"
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        about |= {
            "card": f"{card.name}, {card.total_memory / 2**30:.0f} GiB, {card.multi_processor_count} multiprocessors",
            "cuda": torch.version.cuda,
        }
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            about["driver"] = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
        except (OSError, subprocess.TimeoutExpired) as error:
            about["driver"] = f"unknown ({error})"
    else:
        about["card"] = "none"
    return about


def injected(name: str, faults: dict[str, str]) -> None:
    """Faults for the test of this command."""
    fault = faults.get(name)
    if fault == "hang":
        time.sleep(3600)
    elif fault == "crash":
        os._exit(9)
    elif fault == "raise":
        raise RuntimeError("injected")


def worker(dry: bool, faults: dict[str, str]) -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer

    def answer(**message: Any) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    import torch
    from gpu_parts.models import TINY, TRUE, release
    from gpu_parts.results import Run

    if not dry and not torch.cuda.is_available():
        answer(kind="refused", detail="no CUDA device: `--dry` runs without one")
        return
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    device = torch.device("cpu" if dry else "cuda:0")
    sizes = TINY if dry else TRUE
    answer(kind="ready", about=about_this_machine(dry))
    for line in sys.stdin:
        task = json.loads(line)
        module, function, _ = PARTS[task["part"]]
        deadline = time.monotonic() + task["seconds"]
        run = Run(device, sizes, lambda result: answer(kind="result", **result), task["known"], deadline)
        broken = False
        with run.attempt("the part itself"):
            injected(task["part"], faults)
            getattr(importlib.import_module(f"gpu_parts.{module}"), function)(run)
        try:
            release(device)
            run.synchronize()
        except Exception:  # an error of the device stays with its process
            broken = True
        answer(kind="done")
        if broken:
            return


# --------------------------------------------------------------------------------------------------------------------
# The parent
# --------------------------------------------------------------------------------------------------------------------
class WorkerError(Exception):
    """The worker exceeded a limit or died."""


class Worker:
    def __init__(self, arguments: argparse.Namespace):
        words = [sys.executable, __file__, "--worker", "--out", str(arguments.out)]
        words += ["--dry"] if arguments.dry else []
        words += [word for fault in arguments.inject for word in ("--inject", fault)]
        environment = dict(os.environ)
        if arguments.dry:
            environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        self.log = open(arguments.out / "worker.log", "ab")  # noqa: SIM115
        self.process = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            env=environment,
            start_new_session=True,  # so that it ends with all of its children
        )
        assert self.process.stdout
        self.rest = b""
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.process.stdout, selectors.EVENT_READ)

    def ask(self, task: dict[str, Any]) -> None:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(task).encode() + b"\n")
        self.process.stdin.flush()

    def message(self, deadline: float) -> dict[str, Any]:
        """The next one. Raises WorkerError at the deadline, by `time.monotonic()`, or where the worker is dead."""
        assert self.process.stdout
        while b"\n" not in self.rest:
            if not self.selector.select(max(0.0, deadline - time.monotonic())):
                raise WorkerError("cut: its time limit was reached")
            read = os.read(self.process.stdout.fileno(), 2**16)
            if not read:
                raise WorkerError(f"its worker died with status {self.process.wait()}: see worker.log")
            self.rest += read
        line, _, self.rest = self.rest.partition(b"\n")
        return json.loads(line)

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.log, self.selector):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()  # type: ignore[union-attr]


@dataclass
class Parent:
    arguments: argparse.Namespace

    def __post_init__(self) -> None:
        self.end = time.monotonic() + self.arguments.limit
        self.worker: Worker | None = None
        self.about: dict[str, Any] = {"started": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())}
        self.results: list[dict[str, Any]] = []
        self.parts: dict[str, dict[str, Any]] = {
            name: {"state": "not run: not reached", "seconds": 0.0} for name in self.arguments.parts
        }
        self.lines = open(self.arguments.out / "results.jsonl", "w", buffering=1)  # noqa: SIM115

    def run(self) -> int:
        """The number of parts and results that failed."""
        try:
            for name in self.arguments.parts:
                begin = time.monotonic()
                self.parts[name]["state"] = self.run_part(name)
                self.parts[name]["seconds"] = time.monotonic() - begin
                state = self.parts[name]
                print(f"{name}: {state['state']} ({state['seconds']:.1f} s)", flush=True)
                self.report()
        finally:
            self.stop_worker()
            self.report()
        cut = [part for part in self.parts.values() if part["state"] != "ran"]
        return len(cut) + sum(result["status"] == "FAILED" for result in self.results)

    def report(self) -> None:
        write_report(self.arguments.out, self.about, self.parts, self.results)

    def stop_worker(self) -> None:
        if self.worker is not None:
            self.worker.end()
            self.worker = None

    def run_part(self, name: str) -> str:
        """How it ended, as its state in the report."""
        if self.end - time.monotonic() < 1:
            return f"not run: the total limit of {self.arguments.limit:g} s was reached"
        try:
            if self.worker is None:
                self.start_worker()
            assert self.worker is not None
            own = PARTS[name][2] * (3 if self.arguments.dry else 1)  # a dry run may share its processor
            seconds = min(self.arguments.part_limit or own, self.end - time.monotonic())
            known = {result["name"]: result["value"] for result in self.results if "value" in result}
            deadline = time.monotonic() + seconds
            self.worker.ask({"part": name, "seconds": seconds, "known": known})
            while (message := self.worker.message(deadline)).pop("kind") != "done":
                self.keep({"part": name, **message})
            if not any(result["part"] == name for result in self.results):
                self.keep({"part": name, "name": name, "status": "FAILED", "detail": "the part gave no result"})
            if self.worker.process.poll() is not None:
                self.stop_worker()
            return "ran"
        except (WorkerError, OSError) as error:
            self.stop_worker()
            self.keep({"part": name, "name": "the part itself", "status": "FAILED", "detail": str(error)})
            return str(error)

    def start_worker(self) -> None:
        self.worker = Worker(self.arguments)
        message = self.worker.message(min(self.end, time.monotonic() + STARTING_LIMIT))
        if message["kind"] == "refused":
            self.stop_worker()
            sys.exit(message["detail"])
        self.about |= message["about"]

    def keep(self, result: dict[str, Any]) -> None:
        self.results.append(result)
        self.lines.write(json.dumps(result) + "\n")
        self.lines.flush()
        print(
            f"  {result['name']}: {result['status']} {result.get('value', '')} {result.get('detail', '')}", flush=True
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the report")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--parts", help=f"some of: {', '.join(PARTS)}; separated by ';'")
    parser.add_argument("--limit", type=float, default=480.0, help="seconds of the whole run")
    parser.add_argument("--part-limit", type=float, help="seconds of each part, instead of its own limit")
    parser.add_argument("--inject", action="append", default=[], metavar="PART=hang|raise|crash", help="for tests")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.parts = arguments.parts.split(";") if arguments.parts else list(PARTS)
    if unknown := [name for name in arguments.parts if name not in PARTS]:
        parser.error(f"--parts: no part is named {', '.join(unknown)}; the parts are {'; '.join(PARTS)}")
    return arguments


def main() -> int:
    arguments = parse()
    if arguments.worker:
        worker(arguments.dry, dict(fault.split("=", 1) for fault in arguments.inject))
        return 0
    arguments.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended from outside; the report holds what was measured"))
    return 1 if Parent(arguments).run() else 0


if __name__ == "__main__":
    sys.exit(main())

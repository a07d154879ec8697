"""Modules that the mixins import and the source distribution does not carry."""

import os
import socket
import sys
import traceback
import types
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import modeling_grok1  # noqa: F401  (spawned ranks import this module first, and so have the classes registered)


class ExportTesterMixin:
    """Not in the distribution; `test_compile_and_export` of our own suite covers torch.export."""


class GenerationTesterMixin:
    """Not in the distribution; its cases are written out in our own tests/test_generation_*.py."""


def _run_rank(rank: int, world_size: int, port: int, function: Callable, args: tuple, failures) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ["WORLD_SIZE"] = str(world_size)
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", rank=rank, world_size=world_size)
        function(rank, *args)
    except Exception:
        failures[rank] = traceback.format_exc()
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def run_distributed(world_size: int) -> Callable:
    """Run `function(rank, *args)` in so many gloo processes on this machine; raise what the first to fail raised."""

    def decorate(function: Callable) -> Callable:
        def run(*args) -> None:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            with mp.Manager() as manager:
                failures = manager.dict()
                try:
                    mp.spawn(_run_rank, args=(world_size, port, function, args, failures), nprocs=world_size)
                except Exception as error:
                    raise AssertionError("\n".join(failures.values()) or str(error)) from error

        return run

    return decorate


def _start_rank_processes(target: Callable, args: tuple, nprocs: int) -> None:
    mp.spawn(_enter_rank, args=(target, args), nprocs=nprocs)


def _enter_rank(rank: int, target: Callable, args: tuple) -> None:
    torch.set_num_threads(1)
    target(rank, *args)


def install() -> None:
    """Make the stand-ins importable under the names that the mixins use."""
    contents = {
        "tests.exporters": {},
        "tests.exporters.test_export": {"ExportTesterMixin": ExportTesterMixin},
        "tests.generation": {},
        "tests.generation.test_utils": {"GenerationTesterMixin": GenerationTesterMixin},
        "tests.utils": {},
        "tests.utils.test_configuration_utils": {"config_common_kwargs": {"return_dict": False, "pad_token_id": 7}},
        "tests.distributed_testing_utils": {
            "run_distributed": run_distributed,
            "_start_rank_processes": _start_rank_processes,
            "_get_distributed_backend": lambda: "gloo",
            "_get_distributed_device_type": lambda: "cpu",
            "_get_rank_device": lambda rank: torch.device("cpu"),
            "_set_rank_device": lambda rank: None,
        },
    }
    for name, members in contents.items():
        module = types.ModuleType(name)
        module.__dict__.update(members)
        sys.modules[name] = module


install()

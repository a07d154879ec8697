"""The line that `grok1 plan` prints is one of vLLM's command, for one machine and for several."""

import shlex

import pytest
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.utils.argparse_utils import FlexibleArgumentParser

from grok1.configuration import load_preset
from grok1.sizing.commands import vllm_command
from grok1.sizing.hardware import Gpus
from grok1.sizing.request import Request


@pytest.mark.parametrize(("gpus", "parallel"), [("8xH100", (8, 1, None)), ("2x8xH100", (8, 2, "ray"))])
def test_options(gpus, parallel):
    request = Request(load_preset("grok-1"), Gpus.parse(gpus), folders=lambda precision: "grok-1-hf")
    line = vllm_command(request).splitlines()[-1]
    name, command, *options = shlex.split(line)
    assert (name, command) == ("vllm", "serve")
    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(options)
    validate_parsed_serve_args(parsed)
    found = (parsed.tensor_parallel_size, parsed.pipeline_parallel_size, parsed.distributed_executor_backend)
    assert found == parallel
    assert (parsed.model_tag, parsed.max_model_len) == ("grok-1-hf", 8192)

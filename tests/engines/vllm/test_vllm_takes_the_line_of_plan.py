"""The line that `grok1 plan` prints is one of vLLM's command, for one machine and for several."""

import shlex

import pytest
from typer.testing import CliRunner
from vllm.entrypoints.openai.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.utils.argparse_utils import FlexibleArgumentParser

from grok1.cli import app


@pytest.mark.parametrize(("gpus", "parallel"), [("8xH100", (8, 1, None)), ("2x8xH100", (8, 2, "ray"))])
def test_options(gpus, parallel):
    printed = CliRunner().invoke(app, ["plan", "--gpus", gpus])
    assert printed.exit_code == 0, printed.output
    (line,) = [line for line in printed.output.splitlines() if line.startswith("vllm serve")]
    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(shlex.split(line)[2:])
    validate_parsed_serve_args(parsed)
    found = (parsed.tensor_parallel_size, parsed.pipeline_parallel_size, parsed.distributed_executor_backend)
    assert found == parallel
    assert (parsed.model_tag, parsed.max_model_len) == ("grok-1-hf", 8192)

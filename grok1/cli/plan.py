"""`grok1 plan`: does the model fit on this hardware, and which command runs it."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from grok1.cli.options import AsJson, PrecisionOption


EXAMPLES = """
grok1 plan --gpus 8xH100
grok1 plan --gpus 8x80GB --precision int8
grok1 plan --gpus 1xRTX4090 --precision int8 --host-memory 512GB --disk 7
grok1 plan grok-1-hf --gpus 2x8xH100 --context 8192 --batch 4
grok1 plan --mac 512
grok1 plan --mac 2x256
"""


def plan_command(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="A converted folder, USER/NAME, or a preset. Default: the release."),
    ] = None,
    gpus: Annotated[
        str | None,
        typer.Option(metavar="GPUS", help="8xH100, 8x80GB as sold, 4x24GiB exactly, 2x8xH100 for two machines."),
    ] = None,
    mac: Annotated[
        str | None, typer.Option(metavar="GB", help="A Mac's memory: 512, 256, ...; 2x256 for two Macs.")
    ] = None,
    precision: PrecisionOption = "bfloat16",
    context: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Tokens of a sequence, prompt and output. Default: the model's context."
        ),
    ] = None,
    batch: Annotated[int, typer.Option(metavar="N", min=1, help="Sequences at a time.")] = 1,
    parallel: Annotated[str, typer.Option(metavar="[auto|tp|ep|pp]", help="auto: the fastest possible.")] = "auto",
    chunk: Annotated[int, typer.Option("--prefill-chunk", min=1, help="Prompt tokens processed at a time.")] = 512,
    host_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Host memory for experts, such as 512GB. Default: none.")
    ] = None,
    disk: Annotated[float, typer.Option(min=0.001, metavar="GB/s", help="Read bandwidth of the disk.")] = 7.0,
    as_json: AsJson = False,
) -> None:
    """Check whether Grok-1 fits on this hardware, what would make it fit, and how to run it. Loads no weights."""
    if (gpus is None) == (mac is None):
        raise typer.BadParameter("give either --gpus or --mac.")
    from grok1.cli.progress import starting

    with starting("torch and Transformers"):
        from grok1.sizing.models import find_model

        found = find_model(model)
    context = found.config.max_position_embeddings if context is None else context
    if mac is not None:
        from grok1.cli.plan_macs import mac_json, print_macs
        from grok1.sizing.hardware import parse_macs
        from grok1.sizing.mac import mac_plans

        count, machine = parse_macs(mac)
        plans = mac_plans(found.config, count, machine, context, batch)
        if as_json:
            typer.echo(json.dumps(mac_json(plans), indent=2))
        else:
            print_macs(found.title, count, machine, context, batch, plans)
        raise typer.Exit(0 if any(plan.fits for plan in plans) else 1)

    from grok1.cli.plan_tables import plan_json, print_plan
    from grok1.sizing.hardware import GB, Gpus
    from grok1.sizing.plan import make_plan, suggestions
    from grok1.sizing.request import Request
    from modeling_grok1.sizes_grok1 import parse_size

    assert gpus is not None
    hardware = Gpus.parse(gpus)
    request = Request(
        *(found.config, hardware, precision, context, batch, parallel, chunk),
        folders=found.folder_for,
        host_memory=0 if host_memory is None else parse_size(host_memory, "--host-memory"),
        disk=int(disk * GB),
    )
    plan = make_plan(request)
    others = [] if plan.fits else suggestions(request)
    if as_json:
        typer.echo(json.dumps(plan_json(found.title, request, plan, others), indent=2))
    else:
        print_plan(found.title, request, plan, others)
    if not plan.fits:
        raise typer.Exit(1)

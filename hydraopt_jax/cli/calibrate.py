"""The verb that gathers a calibration: calibrate."""

import shlex
from pathlib import Path

import click

from hydraopt_jax import report
from hydraopt_jax.cli.common import PlaceType
from hydraopt_jax.cli.output import output_options, say
from hydraopt_jax.errors import HydraOptError, exists


@click.command()
@click.argument("model", type=PlaceType())
@click.argument("text", type=click.Path())
@click.option("--out", required=True, type=click.Path(), help="safetensors file to write")
@click.option("--outputs", is_flag=True, help="also gather moments of output gradients, by a backward pass")
@click.option(
    "--rank",
    type=click.IntRange(min=0),
    help="a diagonal and a matrix of this rank, [I, 1 + RANK] per module, not [I, I]; 0: variances only",
)
@click.option(
    "--tokens",
    type=click.IntRange(min=1),
    default=16384,
    show_default=True,
    help="upper limit of tokens to read",
)
@click.option(
    "--length", type=click.IntRange(min=1), default=512, show_default=True, help="tokens per sequence"
)
@click.option("--overwrite", is_flag=True, help="replace what is there")
@output_options
def calibrate(
    model: str,
    text: str,
    out: str,
    outputs: bool,
    rank: int | None,
    tokens: int,
    length: int,
    overwrite: bool,
) -> None:
    """Write the file for --calibration: what MODEL's modules see when it reads TEXT.

    MODEL is the folder or hub id of a causal language model of transformers, such as Llama, or of a PEFT
    adapter: then only the modules that it adapts are looked at, with the adapter in use. TEXT is a file of
    text like what the model will see.
    """
    from hydraopt_jax import calibration
    from hydraopt_jax.integrations import transformers

    if Path(out).exists() and not overwrite:
        raise exists(out)
    if not Path(out).absolute().parent.is_dir():
        raise HydraOptError(f"{out}: there is no such folder: make it, or choose another --out")
    read = transformers.read_text(text)
    moments, count = transformers.moments_of_text(
        *transformers.open_model(model),
        read,
        length=length,
        tokens=tokens,
        rank=rank,
        outputs=outputs,
    )
    calibration.write_moments(out, moments)
    inputs = {k: x for k, x in moments.items() if not k.endswith(calibration.OUTPUT)}
    widest, size = max(len(x) for x in inputs.values()), Path(out).stat().st_size
    table = report.columns("calibration", ">modules", ">tokens", ">widest input")
    table.add_row(report.shorten(out), str(len(inputs)), str(count), str(widest))
    needed, what = widest, f"the widest module's {widest} inputs"
    if rank is not None and calibration.width(widest, rank) < widest:
        needed, what = rank, f"the {rank} directions of --rank"
    few = f"{count} tokens are fewer than {what}: give more text"
    payload = {
        "out": out,
        "model": model,
        "modules": len(inputs),
        "tokens": count,
        "widest": widest,
        "outputs": outputs,
        "rank": rank,
        "bytes": size,
    }
    last = f"{out}: {report.format_bytes(size)}, for compress --calibration {shlex.quote(out)}"
    say(payload, table, few if count < needed else None, last)

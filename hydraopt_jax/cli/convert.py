"""The verb that converts one adapter between formats: convert."""

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from hydraopt_jax import report
from hydraopt_jax.adapters import Adapter
from hydraopt_jax.cli.common import check_range
from hydraopt_jax.cli.output import output_options, say
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.formats import read_adapter, read_trained, write_adapter, write_trained
from hydraopt_jax.formats.families import FAMILIES, LIBRARIES
from hydraopt_jax.formats.image_files import file_of
from hydraopt_jax.formats.peft_config import CONFIG_FILE, base_name
from hydraopt_jax.store.tensors import check_dtype


def is_peft(source: str) -> bool:
    """Whether an adapter is a PEFT folder or a LoRA file, not an Orbax checkpoint."""
    return source.startswith("hf:") or (Path(source) / CONFIG_FILE).exists() or file_of(source) is not None


@click.command()
@click.argument("source")
@click.argument("out", type=click.Path())
@click.option("--to", default="peft", show_default=True, type=click.Choice(["peft", *LIBRARIES]))
@click.option("--family", required=True, type=click.Choice(list(FAMILIES)), help="the base model's family")
@click.option(
    "--from",
    "library",
    type=click.Choice(list(LIBRARIES)),
    help="library that wrote the checkpoint; default: detected",
)
@click.option("--scale", type=float, help="alpha / rank of the checkpoint, read or written")
@click.option("--head-dim", type=int, help="size of a head, as in the base model's config.json")
@click.option("--rank", type=click.IntRange(1), help="rank to write; default: the widest module's")
@click.option("--scan", is_flag=True, help="write layers stacked, as MaxText's scan_layers")
@click.option("--layers", type=click.IntRange(1), help="count of layers to stack")
@click.option(
    "--fused/--no-fused",
    default=None,
    help="whether queries, keys and values share a parameter, as in Gemma 7B; default: by their shapes",
)
@click.option(
    "--step", type=click.IntRange(0), default=0, show_default=True, help="number of the checkpoint to write"
)
@click.option("--base", help="name of the base model, for PEFT's configuration; default: the source's")
@click.option(
    "--prefix", help="prefix of module names in PEFT; default: model.layers, or as a multimodal model has it"
)
@click.option("--dtype", help="dtype on disk: float32, float16 or bfloat16; default: the source's")
@click.option("--overwrite", is_flag=True, help="replace what is there")
@output_options
def convert(source: str, out: str, to: str, **options: Any) -> None:
    """Convert the adapter SOURCE, a PEFT folder or an Orbax checkpoint, to OUT."""
    check_dtype(options["dtype"])
    check_used(source, to)
    adapter = read_source(source, to, **options)
    if to == "peft":
        write_adapter(out, adapter, dtype=options["dtype"], overwrite=options["overwrite"])
        rank, scale = max(x.shape[1] for x in adapter.a.values()), 1.0
    else:
        names = ("rank", "head_dim", "scan", "layers", "fused", "prefix", "step", "dtype", "overwrite")
        scale = (options["scale"] if is_peft(source) else None) or 1.0
        rank = write_trained(
            out, adapter, options["family"], to, scale=scale, **{k: options[k] for k in names}
        )
    table = report.columns("adapter", ">modules", ">rank", ">alpha")
    table.add_row(report.shorten(out), str(len(adapter.a)), str(rank), f"{rank * scale:g}")
    payload = {"out": out, "to": to, "modules": len(adapter.a), "rank": rank, "alpha": rank * scale}
    note = None if to in ("peft", "gemma") else "Make the model with this rank and alpha."
    if to == "peft" and not base_name(adapter.config):
        note = "The base model's name is not in the checkpoint: --base NAME writes it."
    say(payload, table, note)


def check_used(source: str, to: str) -> None:
    """Raise for options that this conversion does not use."""
    context = click.get_current_context()
    idle = {"rank", "scan", "layers", "fused", "step"} if to == "peft" else set()
    why = "--to peft does not use it"
    if is_peft(source):
        # with --to peft, `read_source` says what is wrong
        idle, why = set() if to == "peft" else {"base"}, "the source's configuration names it"
    for name in sorted(idle):
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise HydraOptError(f"--{name}: {why}: leave it out")
    if context.params["layers"] is not None and not context.params["scan"]:
        raise HydraOptError("--layers: used with --scan only: give it, too, or leave --layers out")
    scale = context.params["scale"]
    if scale == 0:
        raise HydraOptError("--scale 0: would make the adapter zero: give alpha / rank")
    if scale is not None:
        check_range(f"--scale {scale:g}", scale)


def read_source(source: str, to: str, **options: Any) -> Adapter:
    """The adapter, with Hugging Face's module names."""
    if is_peft(source):
        if to == "peft":
            raise HydraOptError(f"{source}: is a PEFT folder already: give --to {', --to '.join(LIBRARIES)}")
        if options["library"]:
            raise HydraOptError(f"{source}: is not a checkpoint of {options['library']}: leave --from out")
        return read_adapter(source)
    if not Path(source).is_dir():
        raise HydraOptError(f"{source}: no such folder: pass a PEFT folder or an Orbax checkpoint")
    found = read_trained(
        source,
        options["family"],
        options["library"],
        scale=options["scale"],
        head_dim=options["head_dim"],
        prefix=options["prefix"] or "model.layers",
    )
    known = {"base_model_name_or_path": options["base"]} if options["base"] else {}
    return found.replace(config={**found.config, **known})

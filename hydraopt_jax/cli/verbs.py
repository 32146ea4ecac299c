"""The verbs, imported when they are called: the list of verbs needs neither JAX nor NumPy."""

import importlib

import click

from hydraopt_jax.errors import suggest

# verb -> module and name of its command, line in the help
VERBS = {
    "similarity": ("collections", "similarity", "Measure how alike ADAPTERS are."),
    "compress": ("compress", "compress", "Compress ADAPTERS into one store."),
    "frontier": ("collections", "frontier", "Measure error against bytes, beside other methods."),
    "merge": ("merging", "merge", "Merge ADAPTERS into one by a published method."),
    "inspect": ("stores", "inspect", "Show the tasks and modules of a store."),
    "export": ("stores", "export", "Write tasks of a store as PEFT folders."),
    "verify": ("stores", "verify", "Check a store, against its ADAPTERS if given."),
    "add": ("changes", "add", "Add ADAPTER to a store."),
    "remove": ("changes", "remove", "Remove TASK from a store."),
    "pack": ("stores", "pack", "Write a store as one .safetensors file."),
    "unpack": ("stores", "unpack", "Write a store as a folder."),
    "push": ("hub", "push", "Write a store to the Hugging Face hub."),
    "pull": ("hub", "pull", "Write a store of the hub to disk."),
    "calibrate": ("calibrate", "calibrate", "Measure second moments for compress --calibration."),
    "convert": ("convert", "convert", "Convert an adapter between PEFT, Tunix, MaxText and gemma."),
    "demo": ("collections", "demo", "Compress forty trained adapters and score them."),
}


class Verbs(click.Group):
    """A group that imports a command when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All verbs, in the order of use."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of a verb."""
        if cmd_name not in VERBS:
            return None
        module, name, _ = VERBS[cmd_name]
        return getattr(importlib.import_module(f"hydraopt_jax.cli.{module}"), name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The given verb, or an error that names similar verbs."""
        if args and not args[0].startswith("-") and args[0] not in VERBS:
            raise click.UsageError(f"No such command {args[0]!r}: {suggest(args[0], VERBS)}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one line per verb."""
        with formatter.section("Commands"):
            formatter.write_dl([(verb, line) for verb, (_, _, line) in VERBS.items()])

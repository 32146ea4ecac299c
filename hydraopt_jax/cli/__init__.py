"""The `hydraopt` command: parsing and printing only.

Exit status 0 when all went well, 1 for a failed check, 2 for bad use or bad input; errors are one line on
standard error. With `--json` one JSON object goes to standard output and nothing else.
"""

import contextlib
import ctypes
import io
import os
import sys
from collections.abc import Sequence

# before NumPy and JAX load: OpenBLAS threads under a batched factorization slow it a hundredfold
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import click

from hydraopt_jax import buckets, compilation
from hydraopt_jax.cli.verbs import Verbs
from hydraopt_jax.errors import HydraOptError, TooLarge, suggest

# option of glibc's mallopt: number of heaps
M_ARENA_MAX, HEAPS = -8, 2
LESS = "give fewer adapters or tasks at once, or a machine with more"


@click.group(
    cls=Verbs,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Begin with: hydraopt compress FOLDER_OF_ADAPTERS --out store. Options: hydraopt VERB --help",
)
@click.version_option(package_name="hydraopt-jax")
@click.pass_context
def cli(context: click.Context) -> None:
    """Store many LoRA adapters of one base model in few bytes.

    An ADAPTER is a PEFT folder, a folder of such folders, a LoRA file of diffusers or kohya, or hf:ORG/NAME;
    NAME=ADAPTER names its task. A STORE is a folder or a .safetensors file.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; every expected failure is one line and an exit status."""
    open_streams()
    few_heaps()
    compilation.keep_compiled()
    words = sys.argv[1:] if arguments is None else arguments
    if any(x in str(word) for x in buckets.SCHEMES for word in words):
        silence_libraries()
    try:
        sys.exit(cli.main(args=arguments, prog_name="hydraopt", standalone_mode=False) or 0)
    except TooLarge as error:
        fail(f"{error}; --force keeps it", 1)
    except HydraOptError as error:
        fail(str(error), 2)
    except click.NoSuchOption as error:
        near = f": {suggest(error.option_name, error.possibilities)}" if error.possibilities else ""
        fail(f"No such option {error.option_name!r}{near}{help_of(error)}", error.exit_code)
    except click.UsageError as error:
        fail(f"{error.format_message().rstrip('.')}{help_of(error)}", error.exit_code)
    except click.ClickException as error:
        fail(error.format_message(), error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        fail("interrupted", 130)
    except MemoryError as error:
        fail(f"out of memory{f': {error}' if str(error) else ''}; {LESS}", 2)
    except RuntimeError as error:
        # JAX's own where a device has no room (click's Abort is another); JAX may not have been imported
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        fail(f"out of memory on a device: {str(error)[:200]}; {LESS}", 2)
    except ModuleNotFoundError as error:
        fail(f"the package {error.name} is not installed: install it, or the extra that needs it", 2)
    except OSError as error:
        fail(f"{error.filename or 'input or output'}: {error.strerror or error}", 2)


def open_streams() -> None:
    """Print nowhere where a standard stream is closed, and `?` for letters that standard output lacks."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", errors="replace"))
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")


def few_heaps() -> None:
    """Limit glibc to few heaps.

    By default every thread has a heap of its own, which keeps freed memory: a fifth more memory if many
    threads write chunks.
    """
    with contextlib.suppress(OSError, TypeError, AttributeError):
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, HEAPS)


def silence_libraries() -> None:
    """Send what C++ libraries print to standard error nowhere; Python still prints there.

    Those that TensorStore reads buckets with log a dozen lines where credentials are missing, and have no
    setting against it. TENSORSTORE_VERBOSE_LOGGING keeps all.
    """
    with contextlib.suppress(OSError, ValueError, AttributeError):
        if sys.stderr.fileno() == 2 and "TENSORSTORE_VERBOSE_LOGGING" not in os.environ:
            sys.stderr = os.fdopen(os.dup(2), "w", 1, sys.stderr.encoding, sys.stderr.errors)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def help_of(error: click.UsageError) -> str:
    """A reference to the help of the verb, in parentheses."""
    return "" if error.ctx is None else f" (options: {error.ctx.command_path} --help)"


def fail(message: str, status: int) -> None:
    """Print one line on standard error and exit with a status."""
    click.echo(f"hydraopt: {' '.join(message.split())}", err=True)
    sys.exit(status)

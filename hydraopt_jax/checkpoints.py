"""How Orbax writes checkpoints here."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orbax.checkpoint import v1 as ocp


def save_context() -> "ocp.Context":
    """A context for saving, in which Orbax makes the folders before it writes to them in the background.

    Otherwise, after the error for a place that cannot be written, threads that wait for the folders keep the
    process for minutes.
    """
    from orbax.checkpoint import v1 as ocp

    context = ocp.Context()
    context.asynchronous.create_directories_asynchronously = False
    return context

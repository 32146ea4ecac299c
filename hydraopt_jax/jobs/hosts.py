"""Processes of one job, joined by `jax.distributed`. They share only a folder: modules are independent."""

import jax
import jax.extend.backend
from orbax.checkpoint import multihost

from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.rate_control.work import Processes

# seconds without a heartbeat after which a process counts as dead and the others stop
SILENCE = 20
# seconds that the first process waits for the last
PATIENCE = 7 * 86400


def join_processes(coordinator: str | None, size: int | None, rank: int | None) -> Processes:
    """The processes of a job, after joining them.

    Args:
      coordinator: ADDRESS:PORT of process 0; "auto" if JAX knows the cluster (TPU pods, SLURM, Open MPI,
        Kubernetes); None for a job with a single process.
      size: number of processes; None with "auto".
      rank: number of this process; None with "auto".

    Raises:
      HydraOptError: the other processes cannot be reached, or options that contradict each other.
    """
    if coordinator is None:
        if size is not None or rank is not None:
            raise HydraOptError("--processes and --process-id need --coordinator ADDRESS:PORT")
        return Processes()
    auto = coordinator == "auto"
    if not auto and (size is None or rank is None or not 0 <= rank < size):
        raise HydraOptError(
            "--coordinator ADDRESS:PORT needs --processes N and --process-id 0..N-1; auto finds them "
            "itself on TPU pods and SLURM"
        )
    try:
        jax.distributed.initialize(
            None if auto else coordinator, size, rank, heartbeat_timeout_seconds=SILENCE
        )
    except (RuntimeError, ValueError) as error:
        raise HydraOptError(f"--coordinator {coordinator}: cannot join the job: {error}") from error
    return Processes(jax.process_index(), jax.process_count(), wait, leave)


def wait(name: str) -> None:
    """Wait until every process has reached this barrier.

    Raises:
      HydraOptError: a process has died.
    """
    try:
        # by the coordination service: a collective, as in `multihost_utils.sync_global_devices`, never learns
        # that a process has died; and after the barrier of Orbax v1, which keeps its client, nothing can
        # be saved once `leave` was called
        multihost.get_barrier_sync_fn()(key=f"hydraopt-{name}", timeout_ms=1000 * PATIENCE)
    except jax.errors.JaxRuntimeError as error:  # of the coordination service
        raise HydraOptError(
            f"another process of this job has stopped ({str(error)[:80]}): what is done is kept; start "
            "all processes again to go on"
        ) from error


def leave() -> None:
    """Leave the job: from here on each process is independent, also for Orbax."""
    jax.distributed.shutdown()
    jax.extend.backend.clear_backends()

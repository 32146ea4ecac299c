"""Stores on disk, compared and made by jobs."""

from hydraopt_jax.jobs import job
from hydraopt_jax.rate_control.work import IN_MEMORY

# what Orbax notes of a checkpoint beside its arrays: when it was written, and where
PASSING = ("_CHECKPOINT_METADATA", "commit_success.txt")


def content(path):
    """Every file of a store but what says when and where it was written."""
    return {
        x.relative_to(path).as_posix(): x.read_bytes()
        for x in path.rglob("*")
        if x.is_file() and x.name not in PASSING
    }


def work(path, found, compress, asked, how=IN_MEMORY, **more):
    """A job as the command does it: the store, None in all processes but the first."""
    with job.alone(path, how.processes.rank):
        return job.run_job(path, found, compress, asked, how, **more)

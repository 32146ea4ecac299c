"""Collections coded in segments: targets are met, whoever codes them and however often they stop."""

import errno
import os
import threading

import numpy as np
import pytest

from hydraopt_jax import compression, formats, refinement, synthetic
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.jobs import coded, job, reading, segments
from hydraopt_jax.jobs.job import Processes, Progress
from hydraopt_jax.rate_control import navigate
from hydraopt_jax.store import changes, checkpoint, packing, task_factors

MODULES = {f"layers.{n}.{p}": (192, o) for n in range(2) for p, o in (("q", 192), ("up", 256))}
HALF = navigate.Options(budget=0.5)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Seven adapters on disk, one without some modules, as a collection and read whole."""
    folder = tmp_path_factory.mktemp("adapters")
    made = synthetic.collection(tasks=7, modules=MODULES, rank=4)
    few = [n for n in MODULES if n.endswith("q")]
    made[5] = made[5]._replace(a={n: made[5].a[n] for n in few}, b={n: made[5].b[n] for n in few})
    for x in made:
        formats.write_adapter(folder / x.task, x, dtype="float16")
    names = [str(folder / x.task) for x in made]
    found = reading.collection([reading.open_adapter(n, None, {}) for n in names])
    return names, found, [formats.read_adapter(n) for n in names]


@pytest.fixture(scope="module", autouse=True)
def narrow():
    """Segments of at most three tasks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segments, "DIRECTIONS", 12)
        yield


SMALL = 1 << 15


def code(out, found, options=HALF, **more):
    return coded.run(out, found, options, **({"segment_bytes": SMALL} | more))


@pytest.fixture(scope="module")
def kept(given, tmp_path_factory):
    """The store of half the bytes, in segments."""
    out = tmp_path_factory.mktemp("store") / "s"
    said = code(out, given[1])
    return out, said


def contents(path):
    return {x.relative_to(path).as_posix(): x.read_bytes() for x in path.rglob("*") if x.is_file()}


def test_parts_hold_every_module_of_every_task_once(given):
    _, found, read = given
    parts = segments.parts_of(found, SMALL)
    assert len(parts) > 3
    seen = [(t, m) for p in parts for t in p.tasks for m in p.modules if found.rank(m, t)]
    assert sorted(seen) == sorted((t, m) for t, x in enumerate(read) for m in x.a)


def test_a_budget_is_met_and_errors_are_true(given, kept):
    _, found, read = given
    out, said = kept
    store = checkpoint.restore(out)
    assert store.payload.segments
    assert 0.97 * found.entries() < checkpoint.size_on_disk(out) <= found.entries()
    measured = compression.measure(store, read)
    assert measured == pytest.approx(
        dict(zip(store.tasks, np.nanmean(store.errors, 0), strict=True)), rel=2e-3
    )
    np.testing.assert_allclose(said.errors, store.errors, rtol=2e-3)
    assert list(said.modules) == list(store.modules)
    # what is alike in other segments is not used, tables and structure are written for each
    alone = navigate.compress(read, HALF._replace(share=False))
    assert np.nanmean(store.errors) < 2 * np.nanmean(alone.errors)


def test_some_tasks_come_back_as_among_all(kept):
    out, _ = kept
    store = checkpoint.restore(out)
    names = [store.tasks[5], store.tasks[0]]
    some = checkpoint.restore(out, names)
    for task in names:
        for name, (a, b) in task_factors(some, task).items():
            other = task_factors(store, task)[name]
            np.testing.assert_array_equal(a @ b, other[0] @ other[1])
    _, index = checkpoint.read_index(out)
    assert len(packing.leaves_of(index, [0])) < len(index["leaves"]) / 2


def test_an_error_is_met_closely(given, tmp_path):
    said = code(tmp_path / "s", given[1], navigate.Options(max_error=0.01))
    assert 0.98 * 0.01 < np.nanmean(said.errors) <= 0.01


def test_one_segment_is_an_ordinary_store(given, tmp_path, monkeypatch):
    monkeypatch.setattr(segments, "DIRECTIONS", 512)
    code(tmp_path / "s", given[1], segment_bytes=1 << 24)
    assert not checkpoint.restore(tmp_path / "s").payload.segments


class Stopped(Exception):
    """In place of a kill."""


@pytest.mark.parametrize("after", [1, 4])
def test_a_stopped_job_goes_on_and_ends_with_the_same_store(given, kept, tmp_path, after):
    found = given[1]
    calls = []

    def step(_):
        calls.append(0)
        if len(calls) == after:
            raise Stopped

    with pytest.raises(Stopped):
        code(tmp_path / "s", found, progress=Progress(step=step))
    before = []
    code(tmp_path / "s", found, progress=Progress(start=lambda total, done: before.append(done)))
    assert before[0] > 0
    assert contents(tmp_path / "s") == contents(kept[0])
    assert not job.folder_of(tmp_path / "s").exists()


def test_a_full_disk_is_one_line_and_keeps_what_is_done(given, kept, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "settle", full)
        with pytest.raises(HydraOptError, match="run the same command again"):
            code(tmp_path / "s", given[1])
    assert list(job.folder_of(tmp_path / "s").glob("pass-*.bin"))
    code(tmp_path / "s", given[1])
    assert contents(tmp_path / "s") == contents(kept[0])


def test_two_processes_make_the_same_store(given, kept, tmp_path):
    barrier, said = threading.Barrier(2, timeout=60), {}

    def work(rank):
        who = Processes(rank, 2, lambda name: barrier.wait() and None)
        said[rank] = code(tmp_path / "s", given[1], processes=who)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for x in threads:
        x.start()
    for x in threads:
        x.join()
    assert said[1] is None
    assert contents(tmp_path / "s") == contents(kept[0])


def test_tasks_come_and_go_and_the_others_stay_bit_for_bit(given, kept, tmp_path):
    read = given[2]
    store = checkpoint.restore(kept[0])
    fewer = changes.remove(store, store.tasks[1])
    again = changes.add(fewer, read[1])
    checkpoint.save(tmp_path / "s", again)
    back = checkpoint.restore(tmp_path / "s")
    assert back.tasks == (*(t for t in store.tasks if t != read[1].task), read[1].task)
    for task in fewer.tasks:
        for name, (a, b) in task_factors(store, task).items():
            other = task_factors(back, task)[name]
            np.testing.assert_array_equal(a @ b, other[0] @ other[1])
    error = compression.measure(back, [read[1]])[read[1].task]
    assert error == pytest.approx(np.nanmean(back.errors[:, -1]), rel=2e-3)
    assert error < 2 * np.nanmean(store.errors[:, 1])
    assert checkpoint.measure_size(fewer) < checkpoint.measure_size(store)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (navigate.Options(budget=10**9), "the adapters' factors take no more as they are"),
        (navigate.Options(budget=0.01), "the smallest store that was found takes"),
        (navigate.Options(max_error=1e-14), "cannot be met: the least error that was found"),
        (navigate.Options(max_task_error=0.01), "--max-task-error holds the whole collection in memory"),
        (navigate.Options(budget=0.5, calibration={}), "--calibration holds the whole collection in memory"),
    ],
)
def test_targets_that_cannot_be_met_say_so(given, tmp_path, options, message):
    with pytest.raises(HydraOptError, match=message):
        code(tmp_path / "s", given[1], options)
    assert not list(tmp_path.iterdir())


def test_refinement_of_segments_is_refused(given, kept):
    with pytest.raises(HydraOptError, match="coded in parts because it is large"):
        refinement.refine(checkpoint.restore(kept[0]), given[2])

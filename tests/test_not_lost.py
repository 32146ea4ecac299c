"""What a user has stays: other files, a store until its successor is there, segments of the same bytes."""

import errno
import os

import numpy as np
import pytest
from commands import run
from orbax.checkpoint import v1 as ocp

import hydraopt_jax as hydra
from hydraopt_jax import HydraOptError, buckets, changes, store, synthetic
from hydraopt_jax.errors import TooLarge
from hydraopt_jax.jobs.place import Folder
from hydraopt_jax.store import bucket, folder, manifest, removal, replacing

MODULES = {"m.q": (64, 48), "m.v": (64, 32)}
# of a job
MARK = "abcdef12" * 8


@pytest.fixture(scope="module")
def many():
    return synthetic.collection(tasks=3, modules=MODULES, rank=4)


@pytest.fixture(scope="module")
def lossless(many):
    return hydra.compress(many, budget=1.0)


@pytest.fixture
def full_disk(monkeypatch):
    def save(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ocp, "save", save)


@pytest.fixture
def theirs(tmp_path):
    """A folder of the user that has the name of a job's folder in it."""
    (tmp_path / "theirs" / "job").mkdir(parents=True)
    (tmp_path / "theirs" / "job" / "run.slurm").write_text("mine")
    return tmp_path / "theirs"


@pytest.mark.parametrize(
    "asked", [["--budget", "0.9"], ["--budget", "100B"], ["--budget", "0.9", "--dry-run"]], ids=" ".join
)
def test_a_folder_of_the_user_named_job_is_no_job(theirs, folders, capsys, asked):
    status, _, said = run(capsys, "compress", *folders, "--out", theirs, *asked)
    assert status == 2
    assert "exists: choose another path" in said
    assert (theirs / "job" / "run.slurm").read_text() == "mine"


def test_it_is_not_called_an_unfinished_job(theirs, lossless):
    for call in (lambda: hydra.open(theirs), lambda: hydra.save(theirs, lossless, overwrite=True)):
        with pytest.raises(HydraOptError, match="not a store"):
            call()


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_nor_is_one_inside_a_store(folders, tmp_path, capsys, more):
    words = ("compress", *folders, "--out", tmp_path / "s", "--form", "hydra", "--overwrite")
    assert run(capsys, *words)[0] == 0
    (tmp_path / "s" / "job").mkdir()
    (tmp_path / "s" / "job" / "run.slurm").write_text("mine")
    status, _, said = run(capsys, *words, *more)
    assert status == 2
    assert "is no folder of a job" in said
    assert (tmp_path / "s" / "job" / "run.slurm").read_text() == "mine"
    hydra.update(tmp_path / "s", lambda x: hydra.remove(x, x.tasks[0]))
    assert (tmp_path / "s" / "job" / "run.slurm").read_text() == "mine"


def test_a_stray_file_does_not_keep_a_writer_from_beginning_anew(lossless, tmp_path):
    (tmp_path / "s").mkdir()
    for name in (folder.NEW, ".DS_Store"):
        (tmp_path / "s" / name).touch()
    hydra.save(tmp_path / "s", lossless)
    assert hydra.verify(tmp_path / "s")
    assert (tmp_path / "s" / ".DS_Store").exists()


def test_a_link_into_a_cache_is_the_store_that_it_is_named(lossless, tmp_path):
    (tmp_path / "blobs").mkdir()
    hydra.save(tmp_path / "s.safetensors", lossless)
    (tmp_path / "s.safetensors").rename(tmp_path / "blobs" / "0123abcd")
    (tmp_path / "s.safetensors").symlink_to(tmp_path / "blobs" / "0123abcd")
    assert hydra.verify(tmp_path / "s.safetensors")
    hydra.update(tmp_path / "s.safetensors", lambda x: hydra.remove(x, x.tasks[0]))
    assert len(hydra.open(tmp_path / "s.safetensors").tasks) == 2


def test_what_is_not_of_the_job_outlives_it(lossless, tmp_path):
    place = Folder(tmp_path / "s", MARK)
    place.enter()
    (tmp_path / "s" / "notes.txt").write_text("mine")
    assert folder.unfinished(tmp_path / "s")
    folder.remove_unfinished(tmp_path / "s")
    assert [x.name for x in (tmp_path / "s").iterdir()] == ["notes.txt"]
    with pytest.raises(TooLarge):
        store.save(tmp_path / "t", lossless, limit=10)
    assert not (tmp_path / "t").exists()


def test_a_store_has_one_place_under_all_its_names(lossless, tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    hydra.save("../s", lossless)
    assert hydra.verify("../s") == hydra.verify(tmp_path / "s")
    hydra.save("../s.safetensors", lossless)
    for name in ("s", "s.safetensors"):
        link = tmp_path / f"link-{name}"
        link.symlink_to(tmp_path / name)
        hydra.update(link, lambda x: hydra.remove(x, x.tasks[0]))
        assert link.is_symlink()
        assert len(hydra.open(tmp_path / name).tasks) == 2


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_what_cannot_be_a_path_is_told_in_one_line(name):
    with pytest.raises(HydraOptError, match="cannot be a path"):
        hydra.open(name)


@pytest.mark.parametrize("name", ["s", "s.safetensors"])
@pytest.mark.parametrize("budget", [1.0, 0.9])
def test_equal_segments_are_stored_under_two_names(many, tmp_path, name, budget):
    hydra.save(tmp_path / name, hydra.compress(many, budget=budget))
    nothing = many[0].replace(b={n: 0 * b for n, b in many[0].b.items()})
    for given in (many[0], nothing):
        for again in range(2):
            new = given.replace(task=f"{given is nothing}-{again}")
            hydra.update(tmp_path / name, lambda x, new=new: hydra.add(x, new))
    assert hydra.verify(tmp_path / name)
    found = hydra.open(tmp_path / name)
    assert len(found.tasks) == 7
    for k in range(2):
        back = store.task_factors(found, f"False-{k}")
        for n, (a, b) in back.items():
            np.testing.assert_allclose(a @ b, many[0].a[n] @ many[0].b[n], atol=1e-2)


@pytest.mark.parametrize("asked", [("--budget", "0.9"), ("--form", "hydra"), ("--budget", "100%")])
def test_a_store_outlives_a_rewrite_that_fails(folders, tmp_path, request, capsys, asked):
    words = ("compress", *folders, "--out", tmp_path / "s", *asked)
    assert run(capsys, *words)[0] == 0
    leaves = hydra.verify(tmp_path / "s")
    request.getfixturevalue("full_disk")
    # equal bytes that are there are not written again
    assert run(capsys, *words, "--overwrite")[0] in (0, 2)
    assert hydra.verify(tmp_path / "s") == leaves


def test_damaged_segments_are_written_again(lossless, tmp_path):
    hydra.save(tmp_path / "s", lossless)
    data = max((x for x in (tmp_path / "s" / "segments").rglob("*") if x.is_file()), key=os.path.getsize)
    data.write_bytes(data.read_bytes()[:-9])
    hydra.save(tmp_path / "s", lossless, overwrite=True)
    assert hydra.verify(tmp_path / "s")


def test_an_error_removes_its_own_segment_only(lossless, tmp_path, request):
    place = Folder(tmp_path / "s", MARK)
    place.enter()
    for n in (1, 10, 2):
        place.keep(f"pass-0-{n}", lossless.segments[0])
    place.drop("pass-0-1")
    request.getfixturevalue("full_disk")
    with pytest.raises(OSError, match="No space"):
        place.keep("pass-0-1", lossless.segments[0])
    assert place.segment("pass-0-10").tasks == lossless.segments[0].tasks


def test_who_is_overtaken_removes_nothing_of_the_winner(lossless, tmp_path, monkeypatch):
    """Two machines that run one job: equal names of segments."""
    monkeypatch.setattr(
        buckets,
        "spec",
        lambda path: {"driver": "file", "path": f"{tmp_path}/bucket/{path.partition('://')[2]}"},
    )

    def made(where):
        place = Folder(tmp_path / where, MARK)
        place.enter()
        place.keep("pass-0-0", lossless.segments[0])
        mine = lossless.replace(segments=(place.segment("pass-0-0"),))
        replacing.write_folder(tmp_path / where, mine, known=place.rows())
        return tmp_path / where

    first, second = made("first"), made("second")
    before = bucket.state("s3://b/s").version
    write = buckets.write

    def overtaken(path, data, version=None):
        monkeypatch.setattr(buckets, "write", write)
        bucket.publish(first, "s3://b/s", before)
        return write(path, data, version)

    monkeypatch.setattr(buckets, "write", overtaken)
    with pytest.raises(HydraOptError, match="another process has changed it"):
        bucket.publish(second, "s3://b/s", before)
    assert hydra.verify("s3://b/s") == hydra.verify(second)


def test_what_no_reader_would_take_is_not_written(many, lossless, tmp_path):
    hydra.save(tmp_path / "s", lossless)
    twice = removal.cut_to(lossless, lossless.tasks[:1] * 2)
    odd = hydra.compress([x.replace(dtype="int8") for x in many], budget=0.9)
    for name in ("s", "s.safetensors"):
        for wrong in (removal.cut_to(lossless, []), twice, odd):
            with pytest.raises(HydraOptError, match="cannot be written"):
                hydra.save(tmp_path / name, wrong, overwrite=True)
    assert hydra.verify(tmp_path / "s")
    with pytest.raises(HydraOptError, match="its task has no name"):
        hydra.compress([many[0].replace(task="")])


def test_configurations_come_back_in_the_types_that_they_had(many, tmp_path):
    kinds = [1, True, 1.0]
    given = [x.replace(config={**x.config, "x": v}) for x, v in zip(many, kinds, strict=True)]
    hydra.save(tmp_path / "s", hydra.compress(given, budget=1.0))
    back = hydra.open(tmp_path / "s")
    assert [repr(x.config["x"]) for x in back.sources] == ["1", "True", "1.0"]


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x["segments"][0].pop("arrays"),
        lambda x: x["segments"][0].pop("files"),
        lambda x: x["segments"][0].update(arrays=[]),
        lambda x: x["report"]["options"].update(weights=[1]),
        lambda x: x["report"].update(forms=[1]),
        lambda x: x["report"].update(
            provenance={"made": {"verb": "", "version": "", "date": "", "options": []}}
        ),
    ],
)
def test_manifests_that_lack_what_readers_need_are_damaged(lossless, tmp_path, change):
    hydra.save(tmp_path / "s", lossless)
    said = folder.read_manifest(tmp_path / "s")
    change(said)
    (tmp_path / "s" / folder.MANIFEST).write_bytes(manifest.gzipped(manifest.to_text(said)))
    with pytest.raises(HydraOptError, match="damaged store"):
        hydra.open(tmp_path / "s")


def test_a_task_whose_delta_is_zero_is_exported_and_purged_around(many, tmp_path):
    given = [*many[:2], many[2].replace(b={n: 0 * b for n, b in many[2].b.items()})]
    for form in ({"form": hydra.forms.Hydra()}, {"max_error": 0.05}):
        kept = hydra.compress(given, **form)
        found = hydra.decode(kept, many[2].task)
        assert {n: (a.shape[0], found.b[n].shape[1]) for n, a in found.a.items()} == MODULES
        assert not any(b.any() for b in found.b.values())
        left, _ = changes.purge(hydra.remove(kept, many[0].task))
        assert left.tasks == tuple(x.task for x in many[1:])
        assert changes.estimate_refit(kept, {}).stand_ins == kept.tasks


def test_adapters_that_are_all_zero_lose_nothing(many):
    zero = [x.replace(b={n: 0 * b for n, b in x.b.items()}) for x in many]
    for asked in ({"max_error": 0.05}, {"max_task_error": 0.05}):
        assert hydra.compress(zero, **asked).tasks == tuple(x.task for x in many)

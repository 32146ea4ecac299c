"""What is interrupted at its end, or runs beside another command, loses no store and no file of the user."""

import errno
import json
import os
from contextlib import contextmanager, suppress

import pytest
from commands import run

import hydraopt_jax as hydra
from hydraopt_jax import HydraOptError, buckets, formats, synthetic
from hydraopt_jax.jobs.place import Folder
from hydraopt_jax.store import bucket, files, folder, sizes

AT = "s3://b/store"
MARK = "abcdef12" * 8


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """No test is about a crash of the machine."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(scope="module")
def many():
    return synthetic.collection(tasks=list("abcd"), modules={"m.q": (64, 48), "m.v": (64, 32)}, rank=4)


@pytest.fixture(scope="module")
def kept(many):
    return hydra.compress(many[:3], max_error=0.05)


@pytest.fixture
def adapters(many, tmp_path):
    """Arguments of `compress`: the adapters in folders."""
    for x in many:
        formats.write_adapter(tmp_path / "in" / x.task, x)
    return [f"{x.task}={tmp_path / 'in' / x.task}" for x in many]


@pytest.fixture
def service(tmp_path, monkeypatch):
    """A bucket that is a folder on this machine."""

    def spec(path):
        return {"driver": "file", "path": f"{tmp_path}/bucket/{path.partition('://')[2]}"}

    monkeypatch.setattr(buckets, "spec", spec)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def interrupt(*_, **__):
    raise KeyboardInterrupt


def lost_disk(*_, **__):
    raise OSError(errno.EIO, "Input/output error")


def no_connection(*_, **__):
    raise HydraOptError("no connection to the service")


def after(function, act):
    """The function, with `act` done after it."""

    def call(*arguments, **options):
        found = function(*arguments, **options)
        act()
        return found

    return call


def snapshot(path):
    return {x.relative_to(path): x.is_file() and x.read_bytes() for x in path.rglob("*")}


CHANGES = {
    "add": lambda at, many: hydra.update(at, lambda x: hydra.add(x, many[3])),
    "remove": lambda at, many: hydra.update(at, lambda x: hydra.remove(x, "a")),
    "save": lambda at, many: hydra.save(at, hydra.compress(many[:2], max_error=0.1), overwrite=True),
}
AFTER = {"add": tuple("abcd"), "remove": tuple("bc"), "save": tuple("ab")}


@pytest.mark.parametrize("act", [interrupt, lost_disk])
@pytest.mark.parametrize("name", CHANGES)
def test_an_error_after_the_rename_of_a_manifest_leaves_the_new_store(
    many, kept, tmp_path, monkeypatch, name, act
):
    hydra.save(tmp_path / "s", kept)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", after(os.replace, act))
        with pytest.raises((KeyboardInterrupt, HydraOptError)):
            CHANGES[name](tmp_path / "s", many)
    assert hydra.open(tmp_path / "s").tasks == AFTER[name]
    assert hydra.verify(tmp_path / "s")
    # the next change removes what no manifest names
    hydra.update(tmp_path / "s", lambda x: x)
    rows = folder.read_manifest(tmp_path / "s")["segments"]
    assert {x.name for x in (tmp_path / "s" / "segments").iterdir()} == {x["id"] for x in rows}


def test_so_it_does_where_no_store_was(kept, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", after(os.replace, interrupt))
    with pytest.raises(KeyboardInterrupt):
        hydra.save(tmp_path / "s", kept)
    assert hydra.verify(tmp_path / "s")


@pytest.mark.parametrize("budget", ["1", "0.5"])
def test_so_does_a_job_that_replaces_a_store(kept, adapters, tmp_path, monkeypatch, capsys, budget):
    hydra.save(tmp_path / "s", kept)
    write = folder.write_manifest
    monkeypatch.setattr(folder, "write_manifest", after(write, lost_disk))
    status, _, said = run(
        capsys, "compress", *adapters, "--out", tmp_path / "s", "--budget", budget, "--overwrite", "--force"
    )
    assert (status, said.count("\n")) == (2, 1)
    assert hydra.open(tmp_path / "s").tasks == tuple("abcd")
    assert hydra.verify(tmp_path / "s")


def test_an_error_before_the_rename_leaves_the_old_store_alone(many, kept, tmp_path, monkeypatch):
    hydra.save(tmp_path / "s", kept)
    before = snapshot(tmp_path / "s")
    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        CHANGES["add"](tmp_path / "s", many)
    assert {k: v for k, v in snapshot(tmp_path / "s").items() if k.name != folder.NEW} == before


@pytest.mark.parametrize("act", [interrupt, no_connection])
@pytest.mark.parametrize("name", CHANGES)
def test_a_lost_answer_of_a_bucket_leaves_the_new_store(many, kept, service, monkeypatch, name, act):
    hydra.save(AT, kept)
    with monkeypatch.context() as patch:
        patch.setattr(buckets, "write", after(buckets.write, act))
        with pytest.raises((KeyboardInterrupt, HydraOptError)):
            CHANGES[name](AT, many)
    assert hydra.open(AT).tasks == AFTER[name]
    assert hydra.verify(AT)


@pytest.mark.parametrize("act", [interrupt, no_connection])
def test_an_upload_that_fails_before_the_manifest_leaves_nothing(many, kept, service, monkeypatch, act):
    hydra.save(AT, kept)
    before = buckets.keys(AT)
    monkeypatch.setattr(buckets, "write_objects", after(buckets.write_objects, act))
    with pytest.raises((KeyboardInterrupt, HydraOptError)):
        CHANGES["add"](AT, many)
    assert buckets.keys(AT) == before


def test_segments_that_a_third_writer_has_taken_over_stay(many, kept, service, monkeypatch):
    """The request was carried out, its answer lost, and the store changed again before it was repeated."""
    hydra.save(AT, kept)
    write = buckets.write

    def overtaken(path, data, version=None):
        assert write(path, data, version)
        monkeypatch.setattr(buckets, "write", write)
        CHANGES["remove"](AT, many)
        return write(path, data, version)

    monkeypatch.setattr(buckets, "write", overtaken)
    with pytest.raises(HydraOptError, match="another process has changed it"):
        CHANGES["add"](AT, many)
    assert hydra.open(AT).tasks == tuple("bcd")
    assert hydra.verify(AT)


# what a user may have in a folder named `job`
THEIRS = {
    "empty": {},
    "other": {"job.json": '{"name": "k8s"}', "data.csv": "x"},
    "mark": {"job.json": '{"mark": "good"}'},
    "more": {"job.json": json.dumps({"mark": MARK, "name": "k8s"})},
    "list": {"job.json": "[]"},
    "text": {"job.json": "{"},
    "checked": {"checked-0.json": '{"known": 3, "bad": {}}'},
    "log": {"job.1234": "x"},
}


@pytest.mark.parametrize("name", THEIRS)
def test_folders_of_the_user_are_no_leftovers_of_a_job(kept, adapters, tmp_path, capsys, name):
    out = tmp_path / "theirs"
    (out / "segments" / "audio").mkdir(parents=True)
    (out / "segments" / "audio" / "1.wav").write_text("mine")
    (out / "job").mkdir()
    for file, text in THEIRS[name].items():
        (out / "job" / file).write_text(text)
    hydra.save(tmp_path / "one.safetensors", kept)
    before = snapshot(out)
    compress = ["compress", *adapters, "--out", out, "--max-error", "0.05"]
    for words in (["unpack", tmp_path / "one.safetensors", out], compress, [*compress, "--dry-run"]):
        status, _, said = run(capsys, *words)
        assert (status, said.count("\n")) == (2, 1)
        assert "exists: choose another path" in said
    assert snapshot(out) == before
    with pytest.raises(HydraOptError, match="not a store"):
        hydra.open(out)


def test_a_folder_of_the_user_beside_a_file_is_no_place_of_a_job(adapters, tmp_path, capsys):
    theirs = tmp_path / "s.safetensors.job"
    (theirs / "segments").mkdir(parents=True)
    (theirs / "segments" / "1.wav").write_text("mine")
    words = ["compress", *adapters, "--out", tmp_path / "s.safetensors", "--max-error", "1e-9", "--force"]
    for more in ([], ["--dry-run"]):
        status, _, said = run(capsys, *words, *more)
        assert (status, said.count("\n")) == (2, 1)
        assert f"{theirs}: is no folder of a job, which needs this name: move it" in said
    assert (theirs / "segments" / "1.wav").read_text() == "mine"


@pytest.mark.parametrize("names", [["job.json"], ["checked-0.json"], []])
def test_what_a_job_leaves_is_known_as_that(adapters, tmp_path, capsys, names):
    """A job begins with what it has checked, then its mark; a kill may come before either is complete."""
    place = Folder(tmp_path / "s", MARK)
    place.enter()
    (place.scratch / "checked-0.json").write_text('{"known": {}, "bad": {}}')
    (place.scratch / ".checked-1.json.77.new").write_text('{"kno')
    for x in {"job.json", "checked-0.json"} - set(names):
        (place.scratch / x).unlink()
    with pytest.raises(HydraOptError, match="an unfinished job"):
        hydra.open(tmp_path / "s")
    assert folder.unfinished(tmp_path / "s")
    folder.remove_unfinished(tmp_path / "s")
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("asked", [["--budget", "0.5"], ["--budget", "100B", "--dry-run"], ["--dry-run"]])
@pytest.mark.parametrize("steps", [0, 1])
def test_a_command_that_is_refused_removes_no_job_of_another(adapters, tmp_path, capsys, kept, asked, steps):
    place = Folder(tmp_path / "s", MARK)
    place.enter()
    for n in range(steps):
        place.keep(f"pass-0-{n}", kept.segments[0])
        place.keep_note(f"pass-0-{n}", {})
    before = snapshot(tmp_path / "s")
    run(capsys, "compress", *adapters, "--out", tmp_path / "s", *asked)
    after = snapshot(tmp_path / "s")
    assert {k: after.get(k) for k in before} == before


@pytest.fixture(params=[AT, f"{AT}.safetensors"])
def not_uploaded(request, adapters, service, monkeypatch, capsys):
    """Words of a `compress` to a bucket whose upload has failed, and the store that it has made."""
    words = ["compress", *adapters, "--out", request.param, "--max-error", "0.05", "--force"]
    with monkeypatch.context() as patch:
        patch.setattr(buckets, "write_objects", no_connection)
        patch.setattr(buckets, "write", no_connection)
        status, _, said = run(capsys, *words)
    here = bucket.staging(request.param)
    assert status == 2
    assert f"hydraopt unpack or pack {here})" in said
    assert hydra.verify(here)
    return words, here


def test_a_store_that_was_not_uploaded_is_uploaded_by_the_same_command(not_uploaded, monkeypatch, capsys):
    words, here = not_uploaded
    assert run(capsys, *words, "--dry-run")[::2] == (0, "")
    assert hydra.verify(here)
    assert buckets.keys(AT) == []
    with monkeypatch.context() as patch:
        # it is not made again
        patch.setattr("hydraopt_jax.compression.compress", interrupt)
        assert run(capsys, *words)[::2] == (0, "")
    at = words[words.index("--out") + 1]
    assert hydra.open(at).tasks == tuple("abcd")
    assert hydra.verify(at)
    assert not list(here.parent.parent.iterdir())


def test_another_command_does_not_replace_it(not_uploaded, capsys):
    words, here = not_uploaded
    compress, _, *others = words
    for other in ([compress, *others], [*words, "--alone"], [*words, "--alone", "--overwrite"]):
        status, _, said = run(capsys, *other)
        assert (status, said.count("\n")) == (2, 1)
        assert f"{here}: is a store of a job with other adapters or options that was not uploaded" in said
    assert hydra.open(here).tasks == tuple("abcd")
    assert hydra.verify(here)


def test_a_dry_run_beside_an_unfinished_job_for_a_bucket(adapters, service, capsys):
    place = Folder(bucket.staging(AT), MARK)
    place.enter()
    before = snapshot(place.scratch)
    status, said, error = run(capsys, "compress", *adapters, "--out", AT, "--dry-run")
    assert (status, error) == (0, "")
    assert "nothing was written" in said
    after = snapshot(place.scratch)
    assert {k: after.get(k) for k in before} == before
    assert buckets.keys(AT) == []


def test_of_two_commands_to_one_address_the_second_is_refused(adapters, service, monkeypatch, capsys):
    words = ["compress", *adapters[:3], "--out", AT, "--max-error", "0.05", "--force"]
    write, said = buckets.write_objects, []

    def uploading(*arguments):
        monkeypatch.setattr(buckets, "write_objects", write)
        for more in (["--dry-run"], ["--overwrite"]):
            with pytest.raises(HydraOptError) as error, files.staged(AT, True, "--dry-run" in more):
                pass
            said.append(str(error.value))
        write(*arguments)

    monkeypatch.setattr(buckets, "write_objects", uploading)
    assert run(capsys, *words)[::2] == (0, "")
    assert said == [f"{AT}: another process is writing it: try again when it is done"] * 2
    assert hydra.open(AT).tasks == tuple("abc")
    assert not list(bucket.staging(AT).parent.parent.iterdir())


def test_a_size_is_that_of_what_is_still_there(kept, tmp_path, monkeypatch, capsys):
    hydra.save(tmp_path / "s", kept)
    gone = next((tmp_path / "s" / "segments").iterdir()) / "gone"
    gone.mkdir()
    (gone / "x").write_text("x")
    scan = os.scandir

    @contextmanager
    def late(path):
        with scan(path) as found:
            every = list(found)
        with suppress(FileNotFoundError):
            (gone / "x").unlink()
            gone.rmdir()
        yield every

    whole = sum(x.stat().st_size for x in (tmp_path / "s").rglob("*") if x.is_file()) - 1
    monkeypatch.setattr(os, "scandir", late)
    assert sizes.size_on_disk(tmp_path / "s") == whole
    assert run(capsys, "inspect", tmp_path / "s", "--json")[::2] == (0, "")


@pytest.mark.parametrize(("verb", "said"), [("add", "larger"), ("remove", "smaller")])
def test_bytes_of_a_stopped_job_are_not_those_of_the_store(kept, adapters, tmp_path, capsys, verb, said):
    at = tmp_path / "s"
    hydra.save(at, kept)
    size = sizes.size_on_disk(at)
    assert size == sum(x.stat().st_size for x in at.rglob("*") if x.is_file())
    left = at / "segments" / "of-a-job"
    left.mkdir()
    (left / "data").write_bytes(bytes(1 << 16))
    assert sizes.size_on_disk(at) == size
    assert sum(sizes.account(at, hydra.open(at))) == size
    code, out, _ = run(capsys, verb, at, tmp_path / "in" / "d" if verb == "add" else "a")
    assert code == 0
    assert said in out.splitlines()[-1]


@pytest.mark.parametrize("verb", ["add", "remove"])
def test_a_change_reports_what_it_has_written(adapters, kept, tmp_path, monkeypatch, capsys, verb):
    """As soon as its lock is free another command changes the store."""
    hydra.save(tmp_path / "s", kept)
    locked = files.locked

    @contextmanager
    def then(*arguments, **options):
        with locked(*arguments, **options):
            yield
        monkeypatch.setattr(files, "locked", locked)
        hydra.save(tmp_path / "s", hydra.remove(kept, "c"), overwrite=True)

    monkeypatch.setattr(files, "locked", then)
    words = {"add": adapters[3], "remove": "a"}
    status, said, error = run(capsys, verb, tmp_path / "s", words[verb], "--json")
    assert (status, error) == (0, "")
    assert json.loads(said)["tasks"] == list(AFTER[verb])
    assert hydra.open(tmp_path / "s").tasks == ("a", "b")

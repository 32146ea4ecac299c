"""A store's tasks as folders in a bounded cache that threads and processes share."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import served
from filelock import FileLock

from hydraopt_jax import changes, compression, store
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.formats import read_adapter
from hydraopt_jax.integrations import TaskFolders, cache
from hydraopt_jax.integrations import folders as task_folders
from hydraopt_jax.store import removal

TASKS = served.names(6)


@pytest.fixture
def path(tmp_path):
    store.save(tmp_path / "s.safetensors", served.make(TASKS))
    return tmp_path / "s.safetensors"


@pytest.fixture
def folders(path, tmp_path):
    """With room for two folders and a half."""
    found = TaskFolders(path, tmp_path / "cache", 3300)
    yield found
    found.close()


def there(folders):
    """Names of the folders in the cache."""
    return {x.name for x in folders.cache.path.iterdir() if cache.NAME.fullmatch(x.name)}


def test_a_folder_is_the_task_and_is_made_once(folders, path):
    kept = store.open(path)
    for task in TASKS[:2]:
        found, expected = read_adapter(folders.folder(task)), store.decode(kept, task)
        assert all((found.a[n] == expected.a[n]).all() for n in expected.a)
    before = folders.folder(TASKS[0]).stat().st_ino
    assert folders.folder(TASKS[0]).stat().st_ino == before
    assert len(there(folders)) == 2


def test_the_least_recently_used_goes(folders):
    paths = []
    for task in (*TASKS[:2], TASKS[0], TASKS[2]):
        with folders.held(task) as found:
            paths.append(found)
            assert found.is_dir()
    assert there(folders) == {paths[0].name, paths[3].name}


def test_what_is_held_stays_and_who_needs_room_waits(folders, monkeypatch):
    first, second = (folders.folder(x) for x in TASKS[:2])
    monkeypatch.setattr(cache, "PATIENCE", 0.2)
    with pytest.raises(cache.NoRoom, match=r"all folders are in use.*give the cache more"):
        folders.folder(TASKS[2])
    assert there(folders) == {first.name, second.name}
    monkeypatch.setattr(cache, "PATIENCE", 60)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(folders.folder, TASKS[2])
        time.sleep(0.1)
        assert not waiting.done()
        folders.release(TASKS[0])
        assert waiting.result(timeout=30).is_dir()
    assert there(folders) == {second.name, folders.folder(TASKS[2]).name}


def test_a_hold_counts(folders):
    path = folders.hold(TASKS[0])
    assert folders.hold(TASKS[0]) == folders.folder(TASKS[0]) == folders.folder(TASKS[0]) == path
    folders.release(TASKS[0])
    folders.cache.drop(path.name)
    for task in TASKS[1:4]:
        with folders.held(task):
            assert path.is_dir()
    folders.cache.drop(path.name)
    for task in TASKS[1:4]:
        with folders.held(task):
            pass
    assert not path.exists()


def test_other_users_holds_are_respected_while_they_live(folders, path):
    code = (
        "import sys; from hydraopt_jax.integrations import TaskFolders\n"
        f"found = TaskFolders({str(path)!r}, {str(folders.cache.path)!r}, 3300)\n"
        f"print(found.folder({TASKS[0]!r}), flush=True); sys.stdin.read()\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    held = Path(other.stdout.readline().strip())
    for task in TASKS[1:5]:
        with folders.held(task):
            assert held.is_dir()
    other.kill()
    other.communicate()
    for task in TASKS[1:5]:
        with folders.held(task):
            pass
    assert not held.exists()
    assert len(list((folders.cache.path / "users").iterdir())) == 2


def test_only_folders_of_the_cache_are_removed(folders):
    mine = folders.cache.path / "letters"
    mine.mkdir()
    (mine / "one").write_bytes(b"x" * 10000)
    for task in TASKS:
        with folders.held(task):
            pass
    assert (mine / "one").exists()


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_half_a_folder_is_made_again(folders, name):
    with folders.held(TASKS[0]) as path:
        whole = (path / name).read_bytes()
    os.truncate(path / name, len(whole) // 2) if name.endswith("s") else (path / name).unlink()
    (folders.cache.path / ".new-dead").mkdir()
    with folders.held(TASKS[0]) as again:
        assert again == path
        assert (path / name).read_bytes() == whole
    assert not list(folders.cache.path.glob(".new-*"))


@pytest.mark.parametrize("gone", ["", "users", "*-*"])
def test_a_cache_that_somebody_clears_is_made_again(folders, gone):
    path = folders.folder(TASKS[0])
    for x in folders.cache.path.glob(gone) if gone else [folders.cache.path]:
        shutil.rmtree(x)
    for task in TASKS[1:4]:
        with folders.held(task) as other:
            assert read_adapter(other).a
    assert folders.folder(TASKS[0]) == path
    for task in TASKS[1:4]:
        with folders.held(task):
            assert read_adapter(path).a
    user = folders.cache._user
    assert [x.name for x in user.iterdir()] == [path.name]
    assert cache.alive(Path(f"{user}.lock"))


def test_a_closed_cache_says_so(folders):
    path = folders.folder(TASKS[0])
    folders.close()
    for task in TASKS[:2]:
        with pytest.raises(HydraOptError, match="cache: the cache was closed: open it again"):
            folders.folder(task)
    assert path.is_dir()
    assert not list((folders.cache.path / "users").iterdir())


def test_a_changed_task_has_another_folder_and_the_others_have_not(folders, path):
    kept = folders.folder(TASKS[0])
    store.update(path, lambda x: removal.remove(x, TASKS[5]))
    assert folders.folder(TASKS[0]) == kept
    with pytest.raises(HydraOptError, match="no task"):
        folders.folder(TASKS[5])
    before = read_adapter(kept)
    store.save(path, served.make(TASKS, seed=1), overwrite=True)
    changed = folders.folder(TASKS[0])
    assert changed != kept
    assert any((read_adapter(changed).a[n] != before.a[n]).any() for n in before.a)
    assert all((read_adapter(kept).a[n] == before.a[n]).all() for n in before.a)


def test_folders_of_a_coded_store_outlive_what_is_added(small, tmp_path):
    store.save(tmp_path / "s.safetensors", compression.compress(small[:3], max_error=0.05))
    folders = TaskFolders(tmp_path / "s.safetensors", tmp_path / "cache")
    before = {x: folders.folder(x) for x in folders.tasks}
    store.update(tmp_path / "s.safetensors", lambda x: changes.add(x, small[3]))
    assert {x: folders.folder(x) for x in before} == before
    assert read_adapter(folders.folder(small[3].task)).a.keys() == small[3].a.keys()
    folders.close()


def test_two_stores_share_a_cache(folders, tmp_path):
    store.save(tmp_path / "t.safetensors", served.make(TASKS, seed=1))
    other = TaskFolders(tmp_path / "t.safetensors", folders.cache.path, 3300)
    assert other.folder(TASKS[0]) != folders.folder(TASKS[0])
    other.close()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("none", "cache"), "none: no store there"),
        (("s.safetensors", "cache", "2"), "limit '2': give bytes with a unit"),
        (("s.safetensors", "cache", "much"), "limit 'much': give bytes with a unit"),
        (("s.safetensors", "cache", 0), "limit 0"),
        (("s.safetensors", "file"), "file: cannot be written: .*give another cache"),
    ],
)
def test_bad_use_is_one_line(path, tmp_path, arguments, words):
    (tmp_path / "file").write_text("x")
    at, where, *rest = arguments
    with pytest.raises(HydraOptError, match=words) as caught:
        TaskFolders(tmp_path / at, tmp_path / where, *rest)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "file").read_text() == "x"


def test_bad_tasks_are_refused_before_anything_is_decoded(folders, path, tmp_path, monkeypatch):
    monkeypatch.setattr("hydraopt_jax.store.decoding.decode", None)
    with pytest.raises(HydraOptError, match=r"no task 'task/00' in the store: did you mean 'task/0'"):
        folders.folder("task/00")
    with pytest.raises(
        HydraOptError, match=r"s\.safetensors: names 'org/base', but the model is 'org/other'"
    ):
        folders.folder(TASKS[0], base="org/other")
    assert not there(folders)


def test_a_task_larger_than_the_cache_is_refused(path, tmp_path):
    small = TaskFolders(path, tmp_path / "cache", "1KB")
    with pytest.raises(HydraOptError, match=r"takes .* bytes, the cache may take 1,000: give it more"):
        small.folder(TASKS[0])
    assert not there(small)
    small.close()


def test_a_full_disk_leaves_nothing(folders, monkeypatch):
    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.adapter_folder, "replace_folder", fail)
    with pytest.raises(HydraOptError, match="cache: cannot be written: No space left on device"):
        folders.folder(TASKS[0])
    assert sorted(x.name for x in folders.cache.path.iterdir()) == [".lock", "users"]


LOAD = """
import json, os, random, sys
from pathlib import Path
from concurrent.futures import ThreadPoolExecutor
import served
from filelock import FileLock
from hydraopt_jax.formats import read_adapter
from hydraopt_jax.integrations import TaskFolders

os.fsync = lambda handle: None
path, where, seed = sys.argv[1:]
folders = TaskFolders(path, where, 26_000)
expected = json.loads(Path(path).with_suffix(".json").read_text())
order = random.Random(int(seed)).sample(folders.tasks, 200)

def use(task):
    with folders.held(task, base="org/base") as at:
        found = read_adapter(at)
        return served.right({n: float((found.a[n] @ found.b[n]).sum()) for n in found.a}, expected[task])

with ThreadPoolExecutor(8) as pool:
    print(sum(pool.map(use, order)), len(order))
"""


def test_two_hundred_tasks_in_room_for_twenty(tmp_path):
    made = served.make(served.names(200))
    store.save(tmp_path / "s.safetensors", made)
    (tmp_path / "s.json").write_text(json.dumps(served.answers(made)))
    users = [
        subprocess.Popen(
            [sys.executable, "-c", LOAD, tmp_path / "s.safetensors", tmp_path / "cache", str(n)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(served.__file__).parent), *sys.path])},
        )
        for n in range(2)
    ]
    largest, over = [0], threading.Event()

    def watch():
        while not over.wait(0.05):
            if (tmp_path / "cache" / "users").exists():
                with FileLock(tmp_path / "cache" / ".lock"):
                    largest.append(sum(x.stat().st_size for x in (tmp_path / "cache").glob("*-*/*")))

    watching = threading.Thread(target=watch)
    watching.start()
    said = [x.communicate(timeout=300)[0].split() for x in users]
    over.set()
    watching.join()
    assert said == [["200", "200"]] * 2
    assert 0 < max(largest) <= 26_000
    left = [x for x in (tmp_path / "cache").iterdir() if cache.NAME.fullmatch(x.name)]
    assert 18 <= len(left) <= 22
    assert all(np.isfinite(v).all() for x in left for v in read_adapter(x).a.values())


def test_a_remote_store_is_looked_at_again_for_a_task_that_it_lacked(folders, path, monkeypatch):
    """It has no stamp that tells a change; names come from clients, so not for each of them."""
    looks = []
    monkeypatch.setattr(folders, "path", str(path))
    monkeypatch.setattr(folders, "_opened", float("-inf"))
    read = task_folders.read_state
    known = lambda at: read(Path(at))._replace(stamp=None)  # noqa: E731
    monkeypatch.setattr(task_folders, "read_state", lambda at: looks.append(at) or known(at))
    monkeypatch.setattr(folders, "_state", known(path))
    folders.check(TASKS[0])
    assert not looks
    store.update(path, lambda x: changes.add(x, store.decode(x, TASKS[0]).replace(task="new")))
    folders.check("new")
    for _ in range(2):
        with pytest.raises(HydraOptError, match="no task 'other'"):
            folders.check("other")
    assert len(looks) == 1

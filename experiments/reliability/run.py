"""Kill it, flip it, feed it rubbish, read it while it is written: a store must not lose anything.

    python experiments/reliability/run.py [PART...]

kills: real processes run `hydraopt add`, `remove` and `compress --overwrite` and are killed (SIGKILL), 30
times at a random instant of the command, and once before and once after every rename that they make. After
each kill the store must be the old one or the new one, bit for bit, and pass its checksums.

flips: every byte of every file of three small stores, one of them in several arrays, has a random bit
flipped, every file is cut short and removed. `restore` and `verify` must each find it and name the file.

mutations, fuzz: random changes of valid input, and, with atheris, SECONDS of coverage-guided fuzzing.

concurrency: two processes replace a store over and over, two read it; every read must be whole.

Prints a table and writes run.json beside this file; exit status 1 if anything was lost. Named parts are run
again and written over. About ten minutes on two cores.
"""

import importlib.util
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
OUT = HERE / "run.json"
HOSTILE = HERE.parents[1] / "tests" / "hostile"
RANDOM_KILLS, WRITES, MUTATIONS, SECONDS = 30, 100, 1500, 30
MODULES = {"layers.0.q": (96, 64), "layers.1.q": (96, 64)}


def child(arguments):
    """The command, with a kill before or after its n-th rename if KILL says so ("n before"); counts them."""
    from hydraopt_jax import atomic, cli

    point, when = os.environ.get("KILL", "0 before").split()
    count = 0

    def counted(call):
        def run(*positional, **named):
            nonlocal count
            count += 1
            if count == int(point) and when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            result = call(*positional, **named)
            if count == int(point):
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return run

    os.rename, os.replace = counted(os.rename), counted(os.replace)
    atomic.exchange = counted(atomic.exchange)
    print("ready", flush=True)
    cli.main(arguments)


def start(arguments, kill="0 before"):
    """A child that has loaded everything and begins its command."""
    command = [sys.executable, __file__, "--child", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"KILL": kill})
    process.stdout.readline()
    return process


def bits(path):
    """Everything in a store, decoded."""
    from hydraopt_jax import store
    from hydraopt_jax.store import checkpoint

    checkpoint.verify(path)
    content = checkpoint.restore(path)
    return {
        t: {n: (a.tobytes(), b.tobytes()) for n, (a, b) in store.task_factors(content, t).items()}
        for t in content.tasks
    }


def kills(root, folders):
    """Kill the commands; returns tried and lost, at random instants and at renames."""
    from hydraopt_jax import atomic

    tried = {"random": 0, "rename": 0}
    lost = 0
    rng = np.random.default_rng(0)
    pristine = root / "pristine"
    commands = {
        "add": ["add", str(root / "s"), folders[3], "--quick", "--json"],
        "remove": ["remove", str(root / "s"), "t0", "--quick", "--json"],
        "compress": [
            "compress",
            *folders[2:],
            "--heads",
            "1",
            "--out",
            str(root / "s"),
            "--overwrite",
            "--json",
        ],
    }

    def reset():
        for x in (root / "s", *(atomic.beside(root / "s", r) for r in ("writing", "previous"))):
            shutil.rmtree(x, ignore_errors=True)
        shutil.copytree(pristine, root / "s")

    for arguments in commands.values():
        reset()
        old = bits(root / "s")
        begun = time.perf_counter()
        process = start(arguments)
        begun = time.perf_counter()
        assert process.wait() == 0
        took = time.perf_counter() - begun
        new = bits(root / "s")
        plan = [("random", float(x)) for x in rng.uniform(0, took, RANDOM_KILLS // len(commands))]
        point = 0
        while plan or point >= 0:
            if plan:
                kind, delay = plan.pop()
                reset()
                process = start(arguments)
                time.sleep(delay)
                process.kill()
                process.wait()
            else:
                kind = "rename"
                reset()
                process = start(arguments, f"{point // 2 + 1} {('before', 'after')[point % 2]}")
                if process.wait() == 0:
                    break
                point += 1
            tried[kind] += 1
            try:
                lost += bits(atomic.current(root / "s")) not in (old, new)
            except ValueError as error:
                print(error, file=sys.stderr)
                lost += 1
    return tried, lost


def flips(paths):
    """Flip a bit of every byte, cut and remove every file; returns tried and not found."""
    from hydraopt_jax import HydraOptError
    from hydraopt_jax.store import checkpoint

    rng = np.random.default_rng(1)
    tried = {"bits": 0, "files cut or removed": 0}
    lost = 0

    def missed(path, file):
        out = 0
        for read in (checkpoint.restore, checkpoint.verify):
            try:
                read(path)
                out = 1
            except HydraOptError as error:
                out = max(out, int(file.name not in str(error)))
        return out

    for path in paths:
        for file in sorted(x for x in path.rglob("*") if x.is_file()):
            data = file.read_bytes()
            for at in range(len(data)):
                changed = bytearray(data)
                changed[at] ^= 1 << int(rng.integers(8))
                file.write_bytes(changed)
                lost += missed(path, file)
                tried["bits"] += 1
            file.write_bytes(data[:-1] if data else b"x")
            lost += missed(path, file)
            file.unlink()
            lost += missed(path, file)
            file.write_bytes(data)
            tried["files cut or removed"] += 2
    return tried, lost


def mutations():
    """Random changes of valid input to every target; returns tried and findings."""
    sys.path.insert(0, str(HOSTILE))
    import targets

    rng = np.random.default_rng(2)
    lost, tried = 0, {}
    for name, seed in targets.seeds().items():
        for _ in range(MUTATIONS):
            data = bytearray(seed)
            for at in rng.integers(0, len(data), rng.integers(1, 5)):
                data[at] = rng.integers(256)
            if rng.random() < 0.2:
                del data[int(rng.integers(len(data))) :]
            try:
                targets.TARGETS[name](bytes(data))
            except Exception as error:
                print(name, repr(error), bytes(data), file=sys.stderr)
                lost += 1
        tried[name] = MUTATIONS
    return tried, lost


def fuzz():
    """Inputs of the coverage-guided fuzzer and its findings; nothing where atheris is not installed."""
    if importlib.util.find_spec("atheris") is None:
        return None, 0
    done = subprocess.run(
        [sys.executable, HOSTILE / "fuzz.py", str(SECONDS)], stdout=subprocess.PIPE, text=True
    )
    found = json.loads(done.stdout)
    return found["inputs"], found["findings"]


def write(path, contents, times, queue):
    """Replace a store over and over; report how often it went through and how often the lock was taken."""
    from hydraopt_jax import HydraOptError
    from hydraopt_jax.store import checkpoint

    kept = [checkpoint.restore(x) for x in contents]
    done = refused = 0
    for k in range(times):
        try:
            checkpoint.save(path, kept[k % 2], overwrite=True)
            done += 1
        except HydraOptError as error:
            # nothing else may be said
            refused += "another process is writing it" in str(error)
            time.sleep(0.01)
    queue.put(("write", done, refused, 0))


def read(path, wanted, stop, queue):
    """Read a store until told to stop; report reads, and those that were not one of the whole stores."""
    done = lost = 0
    while not stop.is_set():
        try:
            lost += bits(path) not in wanted
        except ValueError as error:
            print(error, file=sys.stderr)
            lost += 1
        done += 1
    queue.put(("read", done, 0, lost))


def concurrency(root, contents):
    """Two writers and two readers of one store; returns counts and losses."""
    context = multiprocessing.get_context("spawn")
    queue, stop = context.Queue(), context.Event()
    shutil.copytree(contents[0], root / "shared")
    wanted = [bits(x) for x in contents]
    writers = [context.Process(target=write, args=(root / "shared", contents, WRITES, queue)) for _ in "ab"]
    readers = [context.Process(target=read, args=(root / "shared", wanted, stop, queue)) for _ in "ab"]
    for x in (*readers, *writers):
        x.start()
    rows = [queue.get() for _ in writers]
    stop.set()
    rows += [queue.get() for _ in readers]
    for x in (*readers, *writers):
        x.join()
    counts = {
        "writes": sum(r[1] for r in rows if r[0] == "write"),
        "writers refused by the lock": sum(r[2] for r in rows),
        "reads": sum(r[1] for r in rows if r[0] == "read"),
    }
    unheard = 2 * WRITES - counts["writes"] - counts["writers refused by the lock"]
    return counts, unheard + sum(r[3] for r in rows) + int(bits(root / "shared") not in wanted)


def main(chosen):
    from hydraopt_jax import compression, formats, synthetic
    from hydraopt_jax.rate_control import navigate
    from hydraopt_jax.store import checkpoint, container_writer

    made = synthetic.collection(
        3, tasks=[f"t{k}" for k in range(4)], modules=MODULES, rank=3, likeness=0.7, dtype="float32"
    )
    rows = json.loads(OUT.read_text()) if chosen else {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(root / "cache"))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        folders = []
        for x in made:
            formats.write_adapter(root / x.task, x)
            folders.append(f"{x.task}={root / x.task}")
        coded = navigate.compress(made[:3], navigate.Options(max_error=0.02))
        checkpoint.save(root / "pristine", coded)
        checkpoint.save(root / "plain", compression.compress(made[:2], compression.Options(heads=1)))
        array_bytes, container_writer.ARRAY_BYTES = container_writer.ARRAY_BYTES, 2000
        checkpoint.save(root / "arrays", coded)
        container_writer.ARRAY_BYTES = array_bytes
        assert (root / "arrays" / "state" / "data_1").is_dir()
        parts = {
            "flips": lambda: flips([root / "plain", root / "pristine", root / "arrays"]),
            "kills": lambda: kills(root, folders),
            "mutations": mutations,
            "fuzz": fuzz,
            "concurrency": lambda: concurrency(root, [root / "plain", root / "pristine"]),
        }
        for name in chosen or parts:
            tried, lost = parts[name]()
            rows[name] = {"tried": tried, "lost": int(lost)}
            print(f"{name:12} {json.dumps(tried)} lost {lost}", flush=True)
            OUT.write_text(json.dumps(rows, indent=1) + "\n")
    sys.exit(int(any(x["lost"] for x in rows.values())))


if __name__ == "__main__":
    if "--child" in sys.argv:
        child(sys.argv[2:])
    main(sys.argv[1:])

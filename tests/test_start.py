"""Starting: what needs no JAX does not load it."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pytest
from copies import copies

import hydraopt_jax
from hydraopt_jax import compression, formats, store
from hydraopt_jax.cli.verbs import VERBS, Verbs

# any import of these fails in the child; only a folder's chunks are read with TensorStore
HEAVY = ("jax", "jaxlib", "flax", "optax", "orbax")
POISON = f"import sys\nfor x in {(*HEAVY, 'tensorstore')}: sys.modules[x] = None\n"
STORES = f"import sys\nfor x in {HEAVY}: sys.modules[x] = None\n"


def command(*arguments, poison=POISON):
    """The command in a process that cannot import what is poisoned: exit status, output and errors."""
    code = poison + f"from hydraopt_jax.cli import main\nmain({[str(x) for x in arguments]!r})\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["-h"]])
def test_help_needs_no_jax(arguments):
    status, said, error = command(*arguments)
    assert (status, error) == (0, "")
    assert "hydraopt" in said


def test_an_unknown_verb_needs_no_jax():
    status, _, error = command("compres")
    assert status == 2
    assert "No such command 'compres'" in error


@pytest.fixture(scope="module")
def kept(small, tmp_path_factory):
    """A coded store of two tasks as a folder and as a file, and where more can be written."""
    place = tmp_path_factory.mktemp("start")
    made = compression.compress(small[:2], max_error=0.05)
    store.save(place / "s", made)
    store.save(place / "s.safetensors", made)
    return place


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    with copies(tmp_path_factory.mktemp("said")) as call:
        yield call


# a file is read without TensorStore, too
@pytest.fixture(params=[("s", STORES), ("s.safetensors", POISON)], ids=["folder", "file"])
def given(request, kept):
    """Path of a store, and what is poisoned when it is read."""
    name, poison = request.param
    return kept / name, poison


def test_a_store_is_read_without_jax(given, small, copy, tmp_path):
    path, poison = given

    def ok(*arguments):
        status, said, error = copy([*arguments, "--json"], poison, os.environ, tmp_path)
        assert (status, error) == (0, ""), error
        return json.loads(said)

    assert ok("inspect", path)["tasks"] == ["one", "two/three"]
    assert ok("verify", path)["checksums"] == "ok"
    formats.write_adapter(tmp_path / "one", small[0])
    assert ok("verify", path, tmp_path / "one")["ok"]
    out = ok("export", path, "--all", "--out", tmp_path / "out")["exported"]
    kept = store.open(path)
    for task, folder in out.items():
        expected = store.decode(kept, task)
        found = formats.read_adapter(folder)
        assert all((found.a[m] == expected.a[m]).all() for m in expected.a)
    assert ok("pack", path, tmp_path / "t.safetensors")["bytes_after"] > 0
    assert store.verify(tmp_path / "t.safetensors") == store.verify(path)


def test_tasks_are_served_without_jax(given, tmp_path):
    path, poison = given
    code = poison + (
        "import asyncio, os, sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent / 'integrations')!r})\n"
        "import fake_vllm\n"
        "sys.modules |= fake_vllm.modules()\n"
        f"os.environ |= {{'HYDRAOPT_STORE': {str(path)!r}, 'HYDRAOPT_CACHE': {str(tmp_path / 'cache')!r}}}\n"
        "from hydraopt_jax.integrations import hold_tasks, vllm\n"
        "vllm.register()\n"
        "(found,) = sys.modules['vllm.lora.resolver'].LoRAResolverRegistry.resolvers.values()\n"
        "print(asyncio.run(found.resolve_lora('synthetic', 'two/three')).lora_path)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    found, expected = formats.read_adapter(done.stdout.strip()), store.decode(store.open(path), "two/three")
    for m in expected.a:
        np.testing.assert_allclose(found.a[m] @ found.b[m], expected.a[m] @ expected.b[m], atol=1e-6)


def test_a_folder_is_written_by_orbax(kept, tmp_path):
    assert command("unpack", kept / "s.safetensors", tmp_path / "t", poison="")[0] == 0
    assert store.verify(tmp_path / "t") == store.verify(kept / "s")
    status, _, error = command("unpack", kept / "s.safetensors", tmp_path / "u")
    assert status == 2
    assert "is not installed" in error
    assert not (tmp_path / "u").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["inspect", "{}/none"], "no store there"),
        (["inspect", "{}"], "not a store"),
        (["verify", "{}/none.safetensors"], "no store there"),
        (["verify", "{}/s", "--calibration", "x"], "give them, too"),
        (["verify", "{}/s", "--frobnicate"], "--frobnicate"),
        (["export", "{}/s", "--out", "{}/x"], "give either --task NAME or --all"),
        (["export", "{}/s", "--task", "onr", "--out", "{}/x"], "did you mean 'one'"),
        (["export", "{}/s", "--all", "--out", "{}/x", "--dtype", "int3"], "dtype = 'int3'"),
        (["pack", "{}/s", "{}/x"], "ends in .safetensors"),
        (["pack", "{}/s", "{}/s.safetensors"], "exists"),
        (["unpack", "{}/s", "{}/x.safetensors"], "give the name of a folder"),
        (["unpack", "{}/none", "{}/x"], "no store there"),
        (["add", "{}/none", "{}/x"], "no store there"),
        (["add", "{}/s", "{}/x"], "{}/x"),
        (["remove", "{}/s"], "give a TASK"),
        (["remove", "{}/s", "one", "--calibration", "x"], "--calibration: used with"),
        (["remove", "{}/s", "onr"], "did you mean 'one'"),
    ],
)
def test_errors_of_bad_options_need_no_jax(kept, copy, arguments, said):
    before = sorted(x.name for x in kept.iterdir())
    status, out, error = copy([x.format(kept) for x in arguments], STORES, os.environ, kept)
    assert (status, out) == (2, "")
    assert error.startswith("hydraopt: ")
    assert error.count("\n") == 1
    assert said.format(kept) in error
    assert sorted(x.name for x in kept.iterdir()) == before


def test_every_verb_is_listed_and_loads():
    group = Verbs()
    context = click.Context(group)
    assert group.list_commands(context) == list(VERBS)
    for verb in VERBS:
        command = group.get_command(context, verb)
        assert command is not None
        assert command.name == verb
    assert all(len(line) <= 60 and line.endswith(".") for _, _, line in VERBS.values())


def test_every_public_name_resolves_to_its_home():
    assert len(hydraopt_jax.__all__) <= 21
    for name in hydraopt_jax.__all__:
        assert getattr(hydraopt_jax, name) is not None
    for module, names in hydraopt_jax._HOMES.items():
        home = importlib.import_module(f"hydraopt_jax.{module}")
        # a face may call a function by a shorter name than its module does
        other = {x: hydraopt_jax._OTHER.get(x, x) for x in names}
        assert all(getattr(hydraopt_jax, x) is getattr(home, y) for x, y in other.items())
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        hydraopt_jax.nothing  # noqa: B018


KEEP = "from hydraopt_jax import compilation; compilation.keep_compiled('kept')"


@pytest.mark.parametrize("code", [f"{KEEP}; import jax", f"import jax; {KEEP}"])
def test_compiled_computations_are_kept_for_python_too(code, tmp_path):
    code += "; jax.jit(jax.numpy.linalg.svd)(jax.numpy.eye(9))"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    assert any((tmp_path / "kept").iterdir())

"""Shared inputs: strict numerics, seeded collections, and real adapters where they are at hand."""

import gc
import os
from importlib.metadata import version

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Tests compile as much as they compute: most of LLVM's optimizations and XLA's fusion through MLIR take more
# time than they save and change no semantics; see `optimizations` below for what most tests do without.
# `XLA_FLAGS= pytest` has them, and CI where results depend on rounding.
# jaxlib 0.12 lacks the last one, and at a flag that it lacks ends the process, of which pytest shows nothing.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=1 --xla_cpu_parallel_codegen_split_count=1"
    + " --xla_cpu_use_fusion_emitters=false" * version("jaxlib").startswith("0.10."),
)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# where each operation was called from, which only a profiler shows, is a tenth of what lowering takes
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")

from pathlib import Path

import jax
import pytest

from hydraopt_jax import formats, synthetic

# nearly all of what a full collection looks through is what JAX keeps: a sixth of the processor's time
gc.set_threshold(50_000, 20, 100)

# whether a machine survives is not tested here, and a disk that others use makes it take minutes
os.fsync = lambda handle: None

SHARED = Path(__file__).parents[2] / "shared" / "adapters"

jax.config.update("jax_numpy_dtype_promotion", "standard")


def pytest_configure(config):
    """Processes and runs share what is compiled, beside what pytest keeps; `--cache-clear` drops it."""
    if config.pluginmanager.has_plugin("cacheprovider"):
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder = str(config.cache.mkdir("jax"))
        jax.config.update("jax_compilation_cache_dir", folder)


# what these compute is too little to be worth more of LLVM than its selection of instructions: a program
# compiles in less than half the time
COMPILING = (
    "test_apply.py",
    "test_closed.py",
    "test_collection.py",
    "test_compilations.py",
    "test_curves.py",
    "test_derivatives.py",
    "test_diagonalization.py",
    "test_estimates.py",
    "test_folder.py",
    "test_forms.py",
    "test_frontier.py",
    "test_hub.py",
    "test_layers.py",
    "test_lazy.py",
    "test_llm_pipeline.py",
    "test_lowering.py",
    "test_methods.py",
    "test_model.py",
    "test_numbers.py",
    "test_optimize.py",
    "test_outputs.py",
    "test_peft_parity.py",
    "test_pipeline.py",
    "test_shipped.py",
    "test_similarity.py",
    "test_slots.py",
    "test_trees_flax.py",
)


@pytest.fixture(autouse=True, scope="module")
def optimizations(request):
    """None in some modules, unless the caller asks for others."""
    ours = "--xla_backend_optimization_level=1 " in os.environ["XLA_FLAGS"]
    jax.config.update("jax_disable_most_optimizations", ours and request.path.name in COMPILING)


@pytest.fixture(scope="session")
def gpt2():
    """Six real GPT-2 adapters."""
    if not SHARED.exists():
        pytest.skip(f"no real adapters at {SHARED}")
    return [formats.read_adapter(p) for p in sorted((SHARED / "gpt2").iterdir())]


@pytest.fixture(scope="session")
def small():
    """Four seeded adapters of a tiny two-shape model, rank 4, float32."""
    return synthetic.collection(
        1,
        tasks=["one", "two/three", "a.b", "four"],
        modules=synthetic.transformer_modules(2, 24, 12),
        rank=4,
        likeness=0.6,
        dtype="float32",
    )


@pytest.fixture
def folders(small, tmp_path):
    """The small collection as PEFT folders: `NAME=PATH` arguments."""
    out = []
    for n, adapter in enumerate(small):
        formats.write_adapter(tmp_path / f"in{n}", adapter)
        out.append(f"{adapter.task}={tmp_path / f'in{n}'}")
    return out

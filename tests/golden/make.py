"""Write a schema's golden stores, with the version that writes it: `python tests/golden/make.py schema-1`.

One zip a schema, with a store whose factors are coded and one of HydraOpt's plain form, made by the command
from the seeded collection below. They are never made again: what an older version wrote must open for ever.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from hydraopt_jax import formats, synthetic

HYDRAOPT = [sys.executable, "-m", "hydraopt_jax.cli"]
STORES = {"coded": ["--max-error", "0.01"], "plain": ["--heads", "2", "--rank", "3"]}


def collection():
    """Three float32 adapters; the second has a full tensor beside its factors and lacks a module."""
    modules = {"layers.0.q": (96, 64), "layers.0.v": (96, 24)}
    made = synthetic.collection(
        3, tasks=["legal", "a/b", "ünï"], modules=modules, rank=4, likeness=0.9, dtype="float32"
    )
    made[1].a.pop("layers.0.v")
    made[1].b.pop("layers.0.v")
    made[1] = made[1]._replace(extras={"score.weight": np.arange(6, dtype=np.float32).reshape(2, 3)})
    return made


def main(name: str) -> None:
    """Make every store and zip them."""
    with tempfile.TemporaryDirectory() as folder:
        root, arguments = Path(folder), []
        for n, adapter in enumerate(collection()):
            formats.write_adapter(root / f"in{n}", adapter)
            arguments.append(f"{adapter.task}={root / f'in{n}'}")
        for store, options in STORES.items():
            command = [*HYDRAOPT, "compress", *arguments, "--out", root / name / store, *options]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        shutil.make_archive(str(Path(__file__).parent / name), "zip", root / name)


if __name__ == "__main__":
    main(sys.argv[1])

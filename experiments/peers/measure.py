"""Commands timed in processes of their own; float64 errors of PEFT folders, by code that no tool wrote."""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}
# Runs a command for at most so many seconds. A small process of its own, as a command's peak begins at the
# peak of the process that starts it.
WATCH = """
import json, resource, subprocess, sys, time
start = time.perf_counter()
try:
    done = subprocess.run(
        sys.argv[3:], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=float(sys.argv[2])
    )
    failed = f"status {done.returncode}" if done.returncode else ""
    output = done.stdout
except subprocess.TimeoutExpired as error:
    failed, output = "not done in time", error.stdout or b""
used = resource.getrusage(resource.RUSAGE_CHILDREN)
out = {
    "seconds": round(time.perf_counter() - start, 3),
    "cpu_seconds": round(used.ru_utime + used.ru_stime, 3),
    "peak_memory_bytes": 1024 * used.ru_maxrss,
    "failed": failed,
    "tail": output.decode(errors="replace")[-2000:],
}
with open(sys.argv[1], "w") as file:
    json.dump(out, file)
"""


def commit() -> str:
    """The commit of the code that runs."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def watched(command: list[str], limit: float, environment: dict[str, str]) -> dict[str, Any]:
    """Seconds, processor seconds, peak bytes and the end of the output of a command; why it "failed", if it
    did."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.json"
        watch = [sys.executable, "-S", "-c", WATCH, str(log), str(limit), *command]
        subprocess.run(watch, env=os.environ | environment, check=True)
        return json.loads(log.read_text())


def run(command: list[str], limit: float = 3600) -> dict[str, Any]:
    """As `watched`, with one thread; exits with its output where it fails."""
    out = watched(command, limit, ONE_THREAD)
    if out["failed"]:
        raise SystemExit(f"{' '.join(command)}\nfailed, {out['failed']}:\n{out['tail']}")
    return out


def scale(config: dict, module: str) -> float:
    """PEFT's scale of one module: alpha / r, or alpha / sqrt(r) with rsLoRA, patterns first."""

    def pick(pattern: dict, default: float) -> float:
        keys = (x for x in pattern if re.match(rf"(.*\.)?({x})$", module))
        return pattern.get(next(keys, None), default)

    rank = pick(config.get("rank_pattern") or {}, config["r"])
    alpha = pick(config.get("alpha_pattern") or {}, config["lora_alpha"])
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def deltas(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Module name -> (`B: [O, R]` with the LoRA scale folded in, `A: [R, I]`), float64."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    out = {}
    for name, tensor in tensors.items():
        if name.endswith(".lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            b = tensors[f"{module}.lora_B.weight"].astype(np.float64)
            factor = scale(config, module.removeprefix("base_model.model."))
            out[module] = factor * b, tensor.astype(np.float64)
    return out


def square(b: np.ndarray, a: np.ndarray) -> float:
    """`||b @ a||^2` without forming the product, no cancellation: the norm of `Rb @ Ra.T` of two QRs."""
    rb, ra = (np.asarray(np.linalg.qr(x, mode="r")) for x in (b, a.T))
    return float(np.sum((rb @ ra.T) ** 2))


def relative_error(original: Path, other: Path) -> float:
    """`sum_m ||delta_m - other_m||^2 / sum_m ||delta_m||^2` of two PEFT folders.

    A module that `other` lacks counts whole.
    """
    ours, theirs = deltas(original), deltas(other)
    residual = energy = 0.0
    for name, (b, a) in ours.items():
        b_other, a_other = theirs.get(name, (np.zeros((len(b), 1)), np.zeros((1, a.shape[1]))))
        residual += square(np.hstack([b, -b_other]), np.vstack([a, a_other]))
        energy += square(b, a)
    return residual / energy


def folder_bytes(folder: Path) -> int:
    """Sum of the sizes of all files below a folder."""
    return sum(x.stat().st_size for x in folder.rglob("*") if x.is_file())

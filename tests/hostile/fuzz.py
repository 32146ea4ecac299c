"""Coverage-guided fuzzing of `targets` with atheris (the fuzz extra): `python tests/hostile/fuzz.py SECONDS`.

Every target gets an equal share of the time, 2.5 GB and ten seconds an input; the corpus is the committed one
and grows in a temporary folder. Prints one JSON line: inputs tried a target. Exit status 1 on any finding.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent


def child(name: str, arguments: list[str]) -> None:
    """Fuzz one target until libFuzzer stops; never returns."""
    import atheris
    import jax  # noqa: F401  (not instrumented)
    import orbax.checkpoint  # noqa: F401

    mine = ("formats", "store", "codec", "rate_control", "strict_json", "deferred")
    with atheris.instrument_imports(include=[f"hydraopt_jax.{x}" for x in mine]):
        sys.path.insert(0, str(HERE))
        import targets
    # what takes seconds once is not to count as fuzzing
    targets.TARGETS[name](targets.seeds()[name])
    atheris.Setup([sys.argv[0], *arguments], targets.TARGETS[name])
    atheris.Fuzz()


def main(seconds: float) -> int:
    """Fuzz every target in turn."""
    names = sorted(x.name for x in (HERE / "corpus").iterdir())
    tried, status = {}, 0
    for name in names:
        with tempfile.TemporaryDirectory() as grown:
            limits = [
                f"-max_total_time={max(int(seconds / len(names)), 1)}",
                "-rss_limit_mb=2500",
                "-timeout=10",
            ]
            folders = [grown, str(HERE / "corpus" / name)]
            command = [sys.executable, __file__, "--target", name, *limits, "-print_final_stats=1", *folders]
            done = subprocess.run(command, capture_output=True, text=True, cwd=grown)
        found = re.search(r"number_of_executed_units: *(\d+)", done.stderr)
        tried[name] = int(found[1]) if found else 0
        if done.returncode or not found:
            status = 1
            print(done.stderr[-3000:], file=sys.stderr)
    print(json.dumps({"inputs": tried, "total": sum(tried.values()), "findings": status}))
    return status


if __name__ == "__main__":
    if "--target" in sys.argv:
        child(sys.argv[2], sys.argv[3:])
    sys.exit(main(float(sys.argv[1]) if len(sys.argv) > 1 else 20.0))

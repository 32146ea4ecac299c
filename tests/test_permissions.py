"""Files that are written have the permissions that the umask gives any new file."""

import os
import stat

import numpy as np
import pytest
from commands import run

from hydraopt_jax import calibration, formats
from hydraopt_jax.demo import main as demo


@pytest.fixture(params=[0o022, 0o027, 0o077])
def mask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def check(root, mask):
    """Every file and folder under a root, which has at least one, as the umask has it."""
    every = [root, *(root.rglob("*") if root.is_dir() else ())]
    assert any(x.is_file() for x in every)
    for path in every:
        want = (0o777 if path.is_dir() else 0o666) & ~mask
        assert oct(stat.S_IMODE(path.stat().st_mode)) == oct(want), path


@pytest.mark.parametrize(
    "options",
    [
        ["--form", "hydra", "--heads", "2"],
        ["--budget", "0.9"],
        ["--budget", "1"],
        ["--budget", "0.9", "--skip-bad"],
    ],
)
def test_stores_and_exports(capsys, folders, tmp_path, mask, options):
    assert run(capsys, "compress", *folders, "--out", tmp_path / "s", *options)[0] == 0
    check(tmp_path / "s", mask)
    assert run(capsys, "pack", tmp_path / "s", tmp_path / "s.safetensors")[0] == 0
    check(tmp_path / "s.safetensors", mask)
    assert run(capsys, "export", tmp_path / "s", "--all", "--out", tmp_path / "out")[0] == 0
    check(tmp_path / "out", mask)


def test_a_changed_store_and_an_overwritten_export(capsys, folders, tmp_path, mask):
    assert run(capsys, "compress", *folders[:3], "--out", tmp_path / "s", "--max-error", "0.05")[0] == 0
    assert run(capsys, "add", tmp_path / "s", folders[3])[0] == 0
    assert run(capsys, "remove", tmp_path / "s", "one")[0] == 0
    check(tmp_path / "s", mask)
    for _ in range(2):
        given = ["export", tmp_path / "s", "--task", "four", "--out", tmp_path / "out", "--overwrite"]
        assert run(capsys, *given)[0] == 0
        check(tmp_path / "out", mask)


def test_merged_adapters_checkpoints_and_moments(capsys, small, folders, tmp_path, mask):
    assert run(capsys, "merge", *folders, "--out", tmp_path / "merged")[0] == 0
    check(tmp_path / "merged", mask)
    formats.write_checkpoint(tmp_path / "tree", small[0], "flax_nnx", scale=1.0)
    check(tmp_path / "tree", mask)
    (tmp_path / "m").mkdir()
    calibration.write_moments(tmp_path / "m" / "moments.safetensors", {"q": np.ones(3)})
    check(tmp_path / "m", mask)


def test_a_file_that_is_there_keeps_its_permissions(tmp_path, mask):
    file = tmp_path / "moments.safetensors"
    calibration.write_moments(file, {"q": np.ones(3)})
    file.chmod(0o640)
    calibration.write_moments(file, {"q": np.ones(4)})
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    with pytest.raises(Exception):  # noqa: B017, PT011 - whatever safetensors raises
        calibration.write_moments(tmp_path / "none", {"q": object()})
    assert not (tmp_path / "none").exists()


def test_the_demo_is_for_all_to_read(tmp_path, mask):
    demo.run_demo(tmp_path / "demo", tasks=["inflect-en", "inflect-de"], budgets=(0.5,), items=1)
    check(tmp_path / "demo", mask)

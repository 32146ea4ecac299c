"""Collections in groups: the same store as in memory, whatever the groups."""

import numpy as np
import pytest

from hydraopt_jax import checkpoint, compression, formats
from hydraopt_jax.scale import jobs, reading


def cards(folders):
    pairs = [x.partition("=")[::2] for x in folders]
    return [reading.open_adapter(path, task, {}) for task, path in pairs]


@pytest.fixture
def found(folders):
    return reading.collection(cards(folders))


@pytest.fixture
def read(folders):
    return [formats.read_adapter(x.partition("=")[2], task=x.partition("=")[0]) for x in folders]


@pytest.mark.parametrize(
    ("options", "group_bytes"),
    [
        (compression.Options(rank=3), 1),
        (compression.Options(rank=2, side="out", dtype="bfloat16"), 1 << 27),
        (compression.Options(heads=2, rank=3, side="in"), 1 << 27),
    ],
)
def test_store_is_that_of_the_collection_in_memory(found, read, tmp_path, options, group_bytes):
    said = jobs.run(tmp_path / "s", found, options, group_bytes=group_bytes)
    kept = checkpoint.restore(tmp_path / "s")
    expected = compression.compress(read, options)
    np.testing.assert_allclose(kept.errors, expected.errors, rtol=5e-3, atol=1e-6)
    np.testing.assert_allclose(said.errors, kept.errors, rtol=2e-3, atol=1e-6)
    for name, bound in expected.report["bound"].items():
        assert kept.report["bound"][name] == pytest.approx(bound, rel=1e-3, abs=1e-6)
    measured = compression.measure(kept, read)
    mean = dict(zip(kept.tasks, kept.errors.mean(0), strict=True))
    assert measured == pytest.approx(mean, rel=2e-3)
    assert not jobs.folder_of(tmp_path / "s").exists()

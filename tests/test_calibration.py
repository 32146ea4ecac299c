"""Second moments: accumulation is the definition, files come back."""

import jax.numpy as jnp
import numpy as np
import pytest

from hydraopt_jax import HydraOptError, calibration


def test_accumulated_batches_are_the_mean_outer_product():
    x = np.random.default_rng(0).normal(size=(5, 7, 3)).astype(np.float32)
    mask = np.random.default_rng(1).random((5, 7)) < 0.6
    moment = calibration.start(3)
    for rows, keep in zip(x, mask, strict=True):
        moment = calibration.accumulate(moment, jnp.asarray(rows), jnp.asarray(keep))
    kept = x[mask].astype(np.float64)
    np.testing.assert_allclose(calibration.mean(moment), kept.T @ kept / len(kept), rtol=1e-5)


def test_file_comes_back(tmp_path):
    moments = {"layers/0.q": np.eye(4), "k": np.arange(3.0)}
    calibration.save(tmp_path / "c.safetensors", moments)
    back = calibration.load(tmp_path / "c.safetensors")
    assert set(back) == set(moments)
    np.testing.assert_array_equal(back["layers/0.q"], np.eye(4))


@pytest.mark.parametrize("content", [None, b"no tensors"])
def test_unreadable_file_is_one_line(tmp_path, content):
    path = tmp_path / "c.safetensors"
    if_content = {} if content is None else {path: content}
    for where, data in if_content.items():
        where.write_bytes(data)
    with pytest.raises(HydraOptError, match="calibration file"):
        calibration.load(path)

"""LoRA files that diffusers saved, read and written here, give diffusers the same model again.

Needs the `peft` extra and diffusers; models are tiny, random and built from their configurations.
"""

import copy

import numpy as np
import pytest
from safetensors.numpy import save_file
from test_image_files import CONV, Q, delta, kohya

from hydraopt_jax import compression, reading, store
from hydraopt_jax.formats import read_adapter, write_adapter

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
diffusers = pytest.importorskip("diffusers")

# these libraries warn about each other's changes
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def unet():
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()


def output(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        x, y = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 3, 8, generator=generator)
        return model(x, 3, y).sample.numpy()


@pytest.mark.parametrize("pattern", [{}, {"rank_pattern": {"to_v": 2}, "alpha_pattern": {"to_q": 3}}])
def test_what_diffusers_saved_comes_back(tmp_path, pattern):
    base = unet()
    model = copy.deepcopy(base)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "to_v", "conv1"], **pattern)
    model.add_adapter(config)
    with torch.no_grad():
        for name, x in model.named_parameters():
            x.add_(0.3 * torch.randn(x.shape) * ("lora_" in name))
    model.save_lora_adapter(tmp_path / "in")
    want = output(model)
    assert np.abs(want - output(base)).max() > 1e-3
    found = read_adapter(tmp_path / "in")
    assert {x["kind"] for x in found.layout.values() if "kind" in x} == {"convolution"}
    write_adapter(tmp_path / "folded", found)
    kept = compression.compress([found], budget=1.0)
    reading.export(kept, found.task, tmp_path / "kept")
    for folder in ("folded", "kept"):
        again = copy.deepcopy(base)
        again.load_lora_adapter(str(tmp_path / folder), prefix=None, use_safetensors=True)
        np.testing.assert_allclose(output(again), want, rtol=1e-4, atol=1e-5)


def test_diffusers_reads_kohyas_file_as_we_do(tmp_path):
    save_file(kohya(dtype=np.float32), tmp_path / "in.safetensors")
    found = read_adapter(tmp_path / "in.safetensors")
    write_adapter(tmp_path / "folded.safetensors", found)
    kept = compression.compress([found], budget=1.0)
    write_adapter(tmp_path / "kept.safetensors", store.decode(kept, found.task))
    loader = diffusers.loaders.StableDiffusionLoraLoaderMixin
    for name in ("in", "folded", "kept"):
        state, alphas = loader.lora_state_dict(str(tmp_path / f"{name}.safetensors"))
        lows = {k: x.numpy() for k, x in state.items() if "down" in k or "lora_A" in k}
        highs = {k: x.numpy() for k, x in state.items() if "up" in k or "lora_B" in k}
        assert len(lows) == len(highs) == 3
        for module, scale in ((Q, 0.5), (CONV, 2)):
            wanted = delta(kohya(dtype=np.float32), module, scale)
            deltas = []
            for (k, a), (_, b) in zip(sorted(lows.items()), sorted(highs.items()), strict=True):
                stem = k.split(".lora")[0]
                alpha = next((v for key, v in (alphas or {}).items() if key.startswith(stem)), len(a))
                deltas.append(alpha / len(a) * b.reshape(len(b), -1) @ a.reshape(len(a), -1))
            assert any(x.shape == wanted.shape and np.allclose(x, wanted, atol=1e-4) for x in deltas)

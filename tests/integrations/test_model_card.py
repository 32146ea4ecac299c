"""What a push tells of a store, and what stays on this machine."""

import pytest

from hydraopt_jax import compress, formats
from hydraopt_jax.integrations import hub, model_card

pytest.importorskip("huggingface_hub")


def test_what_was_left_out_is_pushed_without_its_place(small):
    kept = compress(small, budget=0.9)
    bad = "/home/me/adapters/broken"
    kept = kept.replace(report=kept.report.replace(left_out={bad: f"{bad}/adapter_config.json: is no JSON"}))
    assert hub.without_paths(kept).report["left_out"] == {"broken": "broken/adapter_config.json: is no JSON"}


def test_a_license_that_was_given_stays(small):
    kept = compress(small, budget=0.9)
    licenses = {small[0].task: "mit", small[1].task: "apache-2.0"}
    card = model_card.render(kept, "org/name", "s.safetensors", 1, licenses)
    assert "license_name: those-of-the-adapters" in card
    for given in ("cc-by-4.0", None):
        card = model_card.render(kept, "org/name", "s.safetensors", 1, licenses, given, card)
        assert "license: cc-by-4.0" in card
        assert "license_name" not in card


def test_a_folder_that_only_has_the_name_says_nothing_of_the_license(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    formats.write_adapter(tmp_path / "legal", small[0])
    (tmp_path / "legal" / "README.md").write_text("---\nlicense: gpl-3.0\n---\n")
    digest = formats.read_adapter(tmp_path / "legal").digest
    assert model_card.license_of("legal", digest) == "gpl-3.0"
    assert model_card.license_of("legal", "0" * 64) == ""

"""vitok export: a folder that the other library loads, and one sentence for what cannot be exported."""

from __future__ import annotations

import json

import pytest
import torch

import vitok as package

pytest.importorskip("diffusers", reason="of the extra diffusers")


def test_diffusers(vitok, models, pictures, tmp_path):
    from vitok.integrations.diffusers import AutoencoderViTok

    stats = tmp_path / "summary.json"
    stats.write_text(json.dumps({"mean": [0.5] * 32, "std": [2.0] * 32, "scaling_factor": 0.25}))
    out = tmp_path / "pipeline" / "vae"
    for options, told, scaling in (
        ((), "scaling_factor 1, shift_factor 0\n", 1.0),
        (("--stats", stats), "scaling_factor 0.25, shift_factor 0.5\n", 0.25),
        (("--data", pictures, "--size", "32", "--samples", "2", "--dtype", "bfloat16"), "measured on 2\nscaling", None),
    ):
        result = vitok("export", "diffusers", "--model", models.pictures, "--out", out, *options)
        assert result.code == 0 and result.out.startswith(told) and result.out.endswith(f"{out}\n"), result.err
        vae = AutoencoderViTok.from_pretrained(out)
        assert vae.config.scaling_factor == scaling or (scaling is None and vae.config.scaling_factor != 0.25)
    ours = package.load(models.pictures, dtype=torch.bfloat16)
    x = torch.zeros(1, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(vae.to(torch.bfloat16).encode(x).latent_dist.mode(), ours.encode(x).mode())


def test_what_cannot_be_exported(vitok, models, pictures, tmp_path):
    (tmp_path / "few.json").write_text('{"mean": [0], "std": [1]}')
    file = tmp_path / "file"
    file.write_text("")
    for options, words in (
        (("--stats", tmp_path / "few.json"), "latents_mean must be 32 finite numbers"),
        (("--stats", tmp_path / "none.json"), "cannot read statistics"),
        (("--stats", tmp_path / "few.json", "--data", pictures), "--stats or --data, not both"),
        (("--data", tmp_path / "none"), "none"),
        (("--out", file), "there is a file where a folder should be"),
    ):
        result = vitok("export", "diffusers", "--model", models.pictures, "--out", tmp_path / "out", *options)
        assert result.code == 2 and words in result.err and len(result.err.splitlines()) == 1, result.err
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())

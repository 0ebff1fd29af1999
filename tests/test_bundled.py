from pathlib import Path

import pytest
import torch

import vitok
from vitok.checkpoint import model_directory
from vitok.evaluate.metrics import psnr, to_uint8
from vitok.io import read_image, resize_and_crop
from vitok.train.config import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
PHOTOS = sorted((ROOT / "examples" / "photos").glob("*.jpg"))


@pytest.fixture(scope="module")
def demo():
    return vitok.load("demo")


def test_demo_is_listed_and_small_enough_for_the_wheel():
    assert "demo" in vitok.list_models()
    assert (model_directory("demo") / "model.safetensors").stat().st_size <= 40e6


def test_demo_is_what_its_recipe_makes(demo):
    recipe = TrainConfig.load(ROOT / "examples" / "train" / "demo.yaml")
    made = vitok.ViTokConfig.from_name(recipe.model, preset=recipe.preset, channels=recipe.channels, **recipe.overrides)
    assert made == demo.config


# PCA of 16 x 16 patches with 64 channels reaches these figures on these pictures, which trained nothing.
@pytest.mark.parametrize(
    ("photo", "pca"),
    list(zip(PHOTOS, (27.55, 32.93, 29.07, 33.03), strict=True)),
    ids=lambda value: getattr(value, "stem", None),
)
@torch.inference_mode()
def test_demo_beats_the_best_linear_tokenizer_on_the_example_photographs(demo, photo, pca):
    original = resize_and_crop(read_image(photo).pixels, 256)[None]
    reconstruction = to_uint8(demo.decode(demo.encode(original).mode())).movedim(1, -1)
    assert psnr(reconstruction, original) > pca

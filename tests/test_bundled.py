from pathlib import Path

import pytest
import torch

import vitok
from vitok.checkpoint import model_directory
from vitok.evaluate.metrics import psnr, to_uint8
from vitok.io import read_image, resize_and_crop
from vitok.io.video import ClipReader
from vitok.train.config import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
PHOTOS = sorted((ROOT / "examples" / "photos").glob("*.jpg"))


@pytest.fixture(scope="module")
def demo():
    return vitok.load("demo")


@pytest.mark.parametrize("name", ["demo", "demo-video"])
def test_bundled_weights_are_listed_and_small_enough_for_the_wheel(name):
    assert name in vitok.list_models()
    assert (model_directory(name) / "model.safetensors").stat().st_size <= 40e6


@pytest.mark.parametrize("name", ["demo", "demo-video"])
def test_bundled_weights_are_what_their_recipes_make(name):
    recipe = TrainConfig.load(ROOT / "examples" / "train" / f"{name}.yaml")
    made = vitok.ViTokConfig.from_name(recipe.model, preset=recipe.preset, channels=recipe.channels, **recipe.overrides)
    assert made == vitok.load(name).config


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


@torch.inference_mode()
def test_demo_video_beats_demo_on_the_example_clip_at_as_many_floats(demo):
    video = vitok.load("demo-video")
    with ClipReader(ROOT / "examples" / "clips" / "coffee_pan.mp4") as reader:
        original = resize_and_crop(next(iter(reader.chunks(16))), 256)[None]
    quality, floats = [], []
    for model, clips in ((demo, original[0].unsqueeze(1)), (video, original)):
        latents = model.encode(clips, layout="channels_last").mode()
        decoded = to_uint8(model.decode(latents, size=tuple(clips.shape[1:4]))).movedim(1, -1)
        quality.append(psnr(decoded.reshape(original.shape), original))
        floats.append(latents.numel())
    assert floats[0] == floats[1]
    assert quality[1] > quality[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_demo_video_loses_little_by_inference(dtype):
    """Its encoder compares large numbers, which bfloat16 could spoil."""
    video = vitok.load("demo-video")
    with ClipReader(ROOT / "examples" / "clips" / "coffee_pan.mp4") as reader:
        original = resize_and_crop(next(iter(reader.chunks(8))), 128)[None]
    quality = []
    for model in (video, video.for_inference(dtype)):
        decoded = model.decode(model.encode(original, layout="channels_last").mode(), size=(8, 128, 128))
        quality.append(psnr(to_uint8(decoded.float()).movedim(1, -1), original))
    assert quality[1] > quality[0] - 0.1

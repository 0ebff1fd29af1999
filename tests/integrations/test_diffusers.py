"""AutoencoderViTok in stock pipelines and trainers, and what diffusers' own tests ask of an auto-encoder."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch

import vitok
from vitok import InputError

pytest.importorskip("diffusers", reason="of the extra diffusers")

import accelerate
from diffusers import AutoModel, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.utils import logging

from vitok.integrations import statistics
from vitok.integrations.diffusers import TILE, AutoencoderViTok, LatentDistribution
from vitok.integrations.statistics import Statistics

logging.disable_progress_bar()
KINDS = {"pictures": ("S-S/8", {}), "clips": ("S-S/2x8", {}), "points": ("S-S/8", {"preset": "v2"})}
MOSTLY_LONG = ["pictures", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("clips", "points"))]


@pytest.fixture
def make(tiny):
    """`make(kind)`: the auto-encoder of a tiny model."""

    def make(kind="pictures", **config):
        name, fields = KINDS[kind]
        return AutoencoderViTok.from_vitok(tiny(name, **fields), **config)

    return make


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def batch(kind):
    """Pixels in [-1, 1] of no whole number of patches."""
    return sample(kind)


def sample(kind, batch=2, height=21, width=30):
    frames = (5,) if kind == "clips" else ()
    return torch.rand(batch, 3, *frames, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def run(vae, x):
    with torch.no_grad():
        return vae(x).sample


def dit(vae, size=4):
    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=1,
        sample_size=size, norm_type="ada_norm_zero", norm_elementwise_affine=False,
    ).eval()  # fmt: skip


@torch.no_grad()
def test_encodes_and_decodes_as_the_model_does(make, kind, batch):
    vae = make(kind)
    posterior, theirs = vae.model.encode(batch, layout="channels_first"), vae.encode(batch).latent_dist
    assert torch.equal(theirs.mode(), posterior.mode()) and torch.equal(theirs.std, posterior.std)
    assert theirs.parameters.shape == (2, 8, *posterior.mean.shape[2:]) and theirs.parameters.is_contiguous()
    assert torch.equal(theirs.parameters[:, :4], posterior.mean)
    expected = vae.model.decode(posterior.mode(), size=batch.shape[2:])
    assert torch.equal(vae(batch).sample, expected) and expected.shape == batch.shape
    whole = vae.decode(posterior.mode(), generator=torch.Generator()).sample
    covered = (6, 24, 32)[-(batch.dim() - 2) :]
    assert whole.shape == (2, 3, *covered) and torch.equal(whole[..., :21, :30][:, :, : batch.shape[2]], expected)
    assert torch.equal(vae.decode(posterior.mode(), size=batch.shape[2:]).sample, expected)


@torch.no_grad()
def test_a_tuple_holds_what_the_output_holds(make, kind, batch):
    vae = make(kind)
    (posterior,), latents = vae.encode(batch, return_dict=False), vae.encode(batch)[0].mode()
    assert torch.equal(posterior.mode(), latents)
    for call in (vae, lambda x, **options: vae.decode(latents, **options)):
        (pixels,) = call(batch, return_dict=False)
        assert torch.equal(pixels, call(batch).sample)
    assert vae.encode(batch).to_tuple()[0].parameters.shape[1] == 8


@torch.no_grad()
def test_distributions(make, kind, batch):
    vae, seeded = make(kind), lambda: torch.Generator().manual_seed(3)
    output = vae.encode(batch)
    posterior = output.latent_dist
    assert isinstance(posterior, DiagonalGaussianDistribution)
    drawn = posterior.sample(seeded())
    assert torch.equal(drawn, posterior.sample(seeded())) and drawn.shape == posterior.mean.shape
    if kind == "points":
        unused = seeded()
        posterior.sample(unused)
        assert torch.equal(unused.get_state(), seeded().get_state())  # nothing is drawn
        assert all(torch.equal(x, posterior.mode()) for x in (drawn, output.latent, output.latents))
        assert posterior.kl().tolist() == posterior.nll(drawn).tolist() == [0, 0] and posterior.std.max() == 0
        return
    assert not hasattr(output, "latents") and not hasattr(output, "latent") and not torch.equal(drawn, posterior.mean)
    assert torch.equal(vae(batch, True, generator=seeded()).sample, vae.decode(drawn, size=batch.shape[2:]).sample)
    noise = (posterior.sample([seeded(), seeded()]) - posterior.mean) / posterior.std
    torch.testing.assert_close(noise[0], noise[1], rtol=1e-4, atol=1e-5)
    normal = torch.distributions.Normal(posterior.mean.double(), posterior.std.double())
    kl = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).flatten(1).sum(1)
    torch.testing.assert_close(posterior.kl().double(), kl, rtol=1e-5, atol=1e-4)
    nll = -normal.log_prob(drawn.double()).flatten(1).sum(1)
    torch.testing.assert_close(posterior.nll(drawn).double(), nll, rtol=1e-5, atol=1e-3)
    moved = LatentDistribution(posterior.parameters + 0.5)
    other = torch.distributions.Normal(moved.mean.double(), moved.std.double())
    expected = torch.distributions.kl_divergence(normal, other).flatten(1).sum(1)
    torch.testing.assert_close(posterior.kl(moved).double(), expected, rtol=1e-5, atol=1e-4)
    assert LatentDistribution(posterior.parameters.bfloat16()).kl().dtype == torch.float32


def test_config_holds_what_pipelines_read(make):
    config = make("clips", scaling_factor=0.5, shift_factor=0.1, latents_std=torch.full((4,), 2.0)).config
    assert json.loads(json.dumps(dict(config)))["vitok"]["temporal_patch"] == 2
    assert (config.scaling_factor, config.shift_factor, config.force_upcast) == (0.5, 0.1, False)
    assert config.latents_mean == [0.0] * 4 and config.latents_std == [2.0] * 4
    assert config.z_dim == config.latent_channels == 4
    assert config.spatial_compression_ratio == config.scale_factor_spatial == 2 ** (len(config.block_out_channels) - 1)
    assert (
        config.temporal_compression_ratio == config.scale_factor_temporal == 2 == 2 ** sum(config.temperal_downsample)
    )
    vae = make("clips")
    assert (vae.spatial_compression_ratio, vae.temporal_compression_ratio) == (8, 2)
    assert 2 ** len(vae.temperal_downsample) == 8 and vae.dtype == torch.float32 and vae.device.type == "cpu"


def test_a_stride_that_is_no_power_of_two(tiny):
    config = AutoencoderViTok.from_vitok(tiny("S-S/3x12")).config
    assert config.block_out_channels is None and config.temperal_downsample is None
    assert (config.spatial_compression_ratio, config.temporal_compression_ratio) == (12, 3)


def test_saves_and_loads(make, kind, batch, tmp_path):
    vae = make(kind, scaling_factor=0.7, latents_mean=[0.1, 0.2, 0.3, 0.4])
    expected = run(vae, batch)
    vae.save_pretrained(tmp_path / "vae")
    assert json.loads((tmp_path / "vae/config.json").read_text())["_class_name"] == "AutoencoderViTok"
    assert (tmp_path / "vae/diffusion_pytorch_model.safetensors").exists()
    for load in (
        lambda: AutoencoderViTok.from_pretrained(tmp_path / "vae"),
        lambda: AutoencoderViTok.from_pretrained(str(tmp_path), subfolder="vae", low_cpu_mem_usage=False),
    ):
        loaded = load()
        assert torch.equal(run(loaded, batch), expected) and not loaded.training
        ours = {key: x for key, x in vae.config.items() if not key.startswith("_")}
        assert {key: x for key, x in loaded.config.items() if not key.startswith("_")} == ours
    again = AutoencoderViTok.from_config(loaded.config)
    assert again.config.scaling_factor == 0.7 and again.config.latents_mean == [0.1, 0.2, 0.3, 0.4]


def test_auto_model_finds_the_class(make, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    make().save_pretrained(tmp_path / "vae")
    assert isinstance(AutoModel.from_pretrained(str(tmp_path / "vae"), trust_remote_code=True), AutoencoderViTok)


def test_loads_shards_and_dtypes(make, tmp_path):
    vae, x = make(), sample("pictures")
    vae.save_pretrained(tmp_path, max_shard_size="80KB")
    assert len(list(tmp_path.glob("*-of-*.safetensors"))) > 2
    assert torch.equal(run(AutoencoderViTok.from_pretrained(tmp_path), x), run(vae, x))
    half, info = AutoencoderViTok.from_pretrained(tmp_path, torch_dtype=torch.bfloat16, output_loading_info=True)
    assert half.dtype == torch.bfloat16 and not info["missing_keys"]
    assert (run(half, x) - run(vae, x)).abs().max() < 0.2 and run(half, x).dtype == torch.bfloat16
    half.save_pretrained(tmp_path / "half")
    assert AutoencoderViTok.from_pretrained(tmp_path / "half", torch_dtype=torch.bfloat16).dtype == half.dtype


def test_results_repeat_and_batches_do_not_matter(make, kind, batch):
    vae = make(kind)
    expected = run(vae, batch)
    assert torch.equal(run(vae, batch), expected) and torch.equal(run(vae, batch[1:]), expected[1:])
    for height, width in ((8, 8), (16, 40), (33, 9)):
        other = sample(kind, 1, height, width)
        assert run(vae, other).shape == other.shape


@torch.no_grad()
def test_tiling_and_slicing_change_nothing(make, kind, monkeypatch):
    vae, x, chunks = make(kind), sample(kind, 3, 48, 64), []

    def spied(plain):
        def spy(x, *, chunk, **options):
            chunks.append((len(x), chunk))
            return plain(x, chunk=chunk, **options)

        return spy

    for side in ("encode", "decode"):
        monkeypatch.setattr(vae.model, side, spied(getattr(vae.model, side)))
    monkeypatch.setattr("vitok.integrations.diffusers.TILE", 10)
    assert TILE == 1024 and not vae.use_tiling and not vae.use_slicing
    expected = vae.encode(x).latent_dist.parameters, vae(x).sample
    assert set(chunks) == {(3, None)}
    for turn, seen in (
        (lambda: vae.enable_tiling(tile_sample_min_height=32), (3, 10)), (vae.enable_slicing, (1, 10)),
        (vae.disable_tiling, (1, None)), (vae.disable_slicing, (3, None)),
    ):  # fmt: skip
        turn()
        chunks.clear()
        for actual, wanted in zip((vae.encode(x).latent_dist.parameters, vae(x).sample), expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-5)
        assert set(chunks) == {seen}
    vae.enable_tiling()
    with torch.enable_grad():
        vae(x).sample.mean().backward()  # which keeps everything whole


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_tiles_of_the_usual_size_give_the_same_bits(dtype):
    vae = AutoencoderViTok.from_vitok(vitok.load("demo", dtype=dtype))
    x = sample("pictures", 2, 512, 640).to(dtype)
    latents = vae.encode(x).latent_dist.mean
    pixels = vae.decode(latents).sample
    vae.enable_tiling()
    assert TILE < 2 * 32 * 40  # tokens
    assert torch.equal(vae.encode(x).latent_dist.mean, latents) and torch.equal(vae.decode(latents).sample, pixels)


def test_gradient_checkpointing_gives_the_same_gradients(make, kind, batch):
    vae, calls = make(kind).train(), []
    gradients = []

    def counted(function, *args):
        calls.append(function)
        return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False)

    for turn in (lambda: None, vae.enable_gradient_checkpointing, lambda: vae.enable_gradient_checkpointing(counted)):
        turn()
        vae.zero_grad()
        loss = vae(batch).sample.square().mean() + vae.encode(batch).latent_dist.mean.square().mean()
        loss.backward()
        gradients.append([p.grad.clone() for p in vae.parameters() if p.grad is not None])
    assert len(calls) == 6 and vae.is_gradient_checkpointing
    for others in gradients[1:]:
        torch.testing.assert_close(others, gradients[0], rtol=1e-5, atol=1e-7)
    vae.disable_gradient_checkpointing()
    assert not vae.is_gradient_checkpointing and all("partial" not in repr(b.forward) for b in vae._blocks())
    run(vae, batch)
    assert len(calls) == 6


@pytest.mark.parametrize("kind", MOSTLY_LONG, indirect=True)
def test_compiles_in_one_graph_without_recompiling(make, kind, batch):
    vae = make(kind)
    expected = run(vae, batch)
    torch.compiler.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        whole = torch.compile(vae, fullgraph=True, backend="eager")
        for _ in range(2):
            torch.testing.assert_close(run(whole, batch), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", MOSTLY_LONG, indirect=True)
def test_one_compiled_graph_is_for_all_sizes(make, kind):
    vae = make(kind)
    torch.compiler.reset()
    any_shape = torch.fx.experimental._config.patch(use_duck_shape=False)  # else squares have a graph of their own
    with any_shape, torch._dynamo.config.patch(error_on_recompile=True):
        whole = torch.compile(vae, fullgraph=True, dynamic=True, backend="aot_eager")
        for size in ((32, 32), (24, 40), (21, 30), (48, 64)):
            x = sample(kind, 2, *size)
            torch.testing.assert_close(run(whole, x), run(vae, x), rtol=0, atol=5e-6)


@pytest.mark.parametrize("kind", MOSTLY_LONG, indirect=True)
def test_compile_reaches_encode_and_decode(make, kind, batch):
    vae, graphs = make(kind), []
    expected = run(vae, batch)
    torch.compiler.reset()

    def backend(graph, _):
        graphs.append(graph)
        return graph

    vae.compile(fullgraph=True, backend=backend)
    with torch.no_grad():
        latents = vae.encode(batch).latent_dist.mode()
        assert len(graphs) == 1
        torch.testing.assert_close(vae.decode(latents, size=batch.shape[2:]).sample, expected, rtol=0, atol=1e-6)
    assert len(graphs) == 2


@pytest.mark.parametrize(("storage", "limit"), [(torch.float16, 0.01), (torch.float8_e4m3fn, 0.1)])
def test_layerwise_casting(make, kind, batch, storage, limit):
    vae = make(kind)
    expected = run(vae, batch)
    vae.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
    assert vae.model.encoder.stack.blocks[0].attention.qkv.weight.dtype == storage and vae.dtype == torch.float32
    actual = run(vae, batch)
    assert (
        actual.dtype == torch.float32 and 1 - torch.cosine_similarity(actual.flatten(), expected.flatten(), 0) < limit
    )


@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
@torch.no_grad()
def test_group_offload(make, kind, batch, level, tmp_path):
    """To disk, so that a weight that is read before its group is brought is seen to be missing."""
    vae = make(kind)
    expected = run(vae, batch)
    here = torch.device("cpu")
    vae.enable_group_offload(here, offload_type=level, num_blocks_per_group=1, offload_to_disk_path=str(tmp_path))
    latents = vae.encode(batch).latent_dist.mode()
    assert torch.equal(vae.decode(latents, size=batch.shape[2:]).sample, expected)
    assert torch.equal(vae(batch).sample, expected)


@torch.no_grad()
def test_sequential_offload(make, kind, batch):
    """As `enable_sequential_cpu_offload` does it: weights wait on the meta device."""
    vae = make(kind)
    expected = run(vae, batch)
    accelerate.cpu_offload(vae, execution_device=torch.device("cpu"))
    assert vae.device.type == "meta"
    latents = vae.encode(batch).latent_dist.mode()
    assert torch.equal(vae.decode(latents, size=batch.shape[2:]).sample, expected)


def test_a_model_hook_runs_before_encode_and_decode(make):
    vae, calls = make(), []

    class Hook(accelerate.hooks.ModelHook):
        def pre_forward(self, module, *args, **options):
            calls.append(module)
            return args, options

    accelerate.hooks.add_hook_to_module(vae, Hook())
    with torch.no_grad():
        vae.decode(vae.encode(sample("pictures")).latent_dist.mode())
    assert calls == [vae, vae]


@pytest.mark.parametrize("kind", ["pictures", "points"])
def test_dit_pipeline(make, kind, tmp_path):
    vae = make(kind, scaling_factor=0.5)
    pipe = DiTPipeline(dit(vae), vae, DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)

    def generate(pipe):
        return pipe([1, 2], num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images

    images = generate(pipe)
    assert images.shape == (2, 32, 32, 3) and images.std() > 0
    vae.enable_tiling()
    vae.enable_slicing()
    assert abs(generate(pipe) - images).max() < 1e-5
    pipe.save_pretrained(tmp_path)
    loaded = DiTPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert isinstance(loaded.vae, AutoencoderViTok) and loaded.vae.config.scaling_factor == 0.5
    assert abs(generate(loaded) - images).max() < 1e-5
    if kind == "pictures":
        loaded.vae = AutoencoderViTok.from_vitok(vae.model.for_inference(torch.float32), scaling_factor=0.5)
        assert abs(generate(loaded) - images).max() < 1e-3


def test_image_to_image_pipeline(make):
    from diffusers import StableDiffusionImg2ImgPipeline, UNet2DConditionModel

    vae = make(scaling_factor=0.5)
    unet = UNet2DConditionModel(
        sample_size=64, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=4,
        cross_attention_dim=8, attention_head_dim=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip
    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)
    pipe = StableDiffusionImg2ImgPipeline(vae, None, None, unet, scheduler, None, None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        prompt_embeds=torch.zeros(1, 4, 8), image=torch.rand(1, 3, 32, 48), strength=0.5, num_inference_steps=4,
        guidance_scale=1.0, generator=torch.Generator().manual_seed(0), output_type="np",
    ).images  # fmt: skip
    assert images.shape == (1, 32, 48, 3) and images.std() > 0


def test_video_pipeline(make):
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

    vae = make("clips", latents_mean=[0.1] * 4, latents_std=[0.5, 1.0, 2.0, 1.0])
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8,
        freq_dim=16, ffn_dim=16, num_layers=1, rope_max_seq_len=32,
    ).eval()  # fmt: skip
    pipe = WanPipeline(None, None, vae, FlowMatchEulerDiscreteScheduler(), transformer)
    pipe.set_progress_bar_config(disable=True)
    frames = pipe(
        prompt_embeds=torch.zeros(1, 4, 8), height=32, width=48, num_frames=5, num_inference_steps=2,
        guidance_scale=1.0, generator=torch.Generator().manual_seed(0), output_type="np",
    ).frames  # fmt: skip
    assert frames.shape == (1, 6, 32, 48, 3) and frames.std() > 0  # 3 latent steps of 2 frames each


def test_statistics_of_data(tiny, pictures, kind):
    """Scaled by what was measured, drawn latents have no mean and unit variance."""
    (pictures / "broken.png").write_bytes(b"no picture")
    name, fields = KINDS[kind]
    model = tiny(name, **fields)
    known = statistics.measure(model, pictures, size=32)
    assert known.samples == 3
    assert known == statistics.measure(model, pictures, size=32) and known != statistics.measure(
        model, pictures, size=24
    )
    vae = AutoencoderViTok.from_vitok(model, stats=known)
    config = vae.config
    assert config.latents_mean == known.mean and config.scaling_factor == known.scaling_factor
    assert config.shift_factor == pytest.approx(sum(known.mean) / 4)
    posteriors = []
    for path in sorted(pictures.glob("picture*")):
        pixels = vitok.io.resize_and_crop(vitok.io.read_image(path).pixels, 32).permute(2, 0, 1)[None]
        with torch.no_grad():
            posteriors.append(vae.encode(pixels[:, :, None] if kind == "clips" else pixels).latent_dist)
    z = torch.stack([posterior.sample() for _ in range(500) for posterior in posteriors]).double()
    scaled = (z - config.shift_factor) * config.scaling_factor
    assert scaled.mean().abs() < 0.03 and abs(scaled.std() - 1) < 0.03
    channels = z.transpose(0, 2).flatten(1)
    whitened = (channels - torch.tensor(config.latents_mean)[:, None]) / torch.tensor(config.latents_std)[:, None]
    assert whitened.mean(1).abs().max() < 0.06 and (whitened.std(1) - 1).abs().max() < 0.06


def test_statistics_of_a_cache(make, tmp_path):
    path = tmp_path / "summary.json"
    values = {"mean": [0.0, 1.0, 0.0, 1.0], "std": [1.0, 2.0, 1.0, 2.0]}
    path.write_text(json.dumps({**values, "samples": 7}))
    config = make(stats=path).config
    assert config.latents_std == values["std"] and config.shift_factor == 0.5
    assert config.scaling_factor == pytest.approx((2.5 + 0.25) ** -0.5)
    path.write_text(json.dumps({**values, "scaling_factor": 0.3}))
    assert make(stats=path).config.scaling_factor == 0.3
    assert make(stats=path, scaling_factor=1.0).config.scaling_factor == 1.0
    known = Statistics(values["mean"], values["std"], 0.3)
    assert make(stats=known).config.latents_mean == values["mean"]


def test_input_errors(make, tiny, tmp_path, one_sentence, pictures):
    vae = make()
    vae.save_pretrained(tmp_path / "good")
    fields = dict(vae.config.vitok)
    (tmp_path / "text.json").write_text("{")
    (tmp_path / "short.json").write_text('{"mean": [0, 1], "std": [1]}')
    (tmp_path / "two.json").write_text('{"mean": [0, 1], "std": [1, 1]}')
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text('{"_class_name": "AutoencoderKL", "in_channels": 3}')
    tiny().save(tmp_path / "plain")
    wrong = tmp_path / "wrong"
    vae.save_pretrained(wrong)
    config = json.loads((wrong / "config.json").read_text())
    (wrong / "config.json").write_text(
        json.dumps({**config, "vitok": {**fields, "channels": 5}, "latents_mean": None, "latents_std": None})
    )
    deeper = tmp_path / "deeper"
    vae.save_pretrained(deeper)
    (deeper / "config.json").write_text(json.dumps({**config, "vitok": {**fields, "encoder_depth": 3}}))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/x.png").write_bytes(b"")
    load = AutoencoderViTok.from_pretrained
    for call, words in (
        (lambda: AutoencoderViTok(), ("no `vitok`",)),
        (lambda: AutoencoderViTok(vitok={**fields, "norm": "batch"}), ("'norm'", "layer, rms")),
        (lambda: AutoencoderViTok(vitok=fields, latents_mean=[1.0]), ("latents_mean must be 4 finite numbers",)),
        (lambda: AutoencoderViTok(vitok=fields, latents_std=[0.0] * 4), ("latents_std", "positive")),
        (lambda: AutoencoderViTok(vitok=fields, scaling_factor=float("nan")), ("scaling_factor must be a finite",)),
        (lambda: AutoencoderViTok.from_vitok("nothing"), ("no weights 'nothing'",)),
        (lambda: make(stats=tmp_path / "text.json"), ("cannot read statistics", "text.json")),
        (lambda: make(stats=tmp_path / "short.json"), ("short.json", "`mean` and `std`")),
        (lambda: make(stats=tmp_path / "two.json"), ("latents_mean must be 4",)),
        (lambda: load(tmp_path), ("cannot load", "config.json")),
        (lambda: load(tmp_path / "other"), ("other is no AutoencoderViTok", "no `vitok`")),
        (lambda: load(tmp_path / "plain"), ("plain is no AutoencoderViTok", "from_vitok")),
        (lambda: load(wrong), ("cannot load", "shape")),
        (lambda: load(deeper), ("deeper lacks weight(s)", "encoder.stack.blocks.2")),
        (lambda: vae.encode(torch.rand(2, 4, 8, 8)), ("3 colour channels",)),
        (lambda: vae.decode(torch.rand(2, 5, 2, 2)), ("[B, 4, h, w]", "[2, 5, 2, 2]")),
        (lambda: make().from_vitok(tiny().for_inference()).save_pretrained(tmp_path / "fast"), ("cannot be saved",)),
        (lambda: statistics.measure(tiny(), tmp_path / "empty"), ("none of the chosen pictures",)),
    ):  # fmt: skip
        with pytest.raises(InputError) as error:
            call()
        one_sentence(error.value, *words)
    assert not (tmp_path / "fast").exists()


def test_without_the_package(python):
    code = """
import sys
sys.modules["diffusers"] = None
import vitok.integrations
try:
    import vitok.integrations.diffusers
except vitok.InputError as error:
    print(error)
"""
    assert python(code) == "AutoencoderViTok needs diffusers: pip install 'vitok[diffusers]'"


@pytest.mark.long
def test_without_torchvision(python):
    code = """
import sys
sys.modules["torchvision"] = None
import torch, vitok
from vitok.integrations.diffusers import AutoencoderViTok
from diffusers import DiTPipeline, StableDiffusionImg2ImgPipeline, WanPipeline
vae = AutoencoderViTok.from_vitok(vitok.create_model("Ti-Ti/16", encoder_depth=1, decoder_depth=1))
print(list(vae(torch.zeros(1, 3, 16, 16)).sample.shape))
"""
    assert python(code) == "[1, 3, 16, 16]"


def test_the_page_runs(monkeypatch, tmp_path):
    page = Path(__file__).parents[2] / "docs" / "integrations" / "diffusers.md"
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(code, names)
    assert names["images"].shape == (2, 3, 64, 64) and names["losses"][-1] < names["losses"][0]

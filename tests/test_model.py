"""The model: its blocks against the published formulas written out plainly, and everything it is fed with."""

from __future__ import annotations

import math
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import vitok
from vitok import InputError
from vitok.bottlenecks import GaussianPosterior, PointPosterior
from vitok.config import ViTokConfig
from vitok.layers import ParallelBlock, Places, SerialBlock

plain = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("plain_formulas.py"))))


def whole_block(block, x: Tensor, table: Tensor) -> Tensor:
    """A block with its last branch added, which in a stack is left to the next norm."""
    x, (out, scale) = block(x, None, Places(table))
    return x + (out if scale is None else out * scale)


# --- From their rows to ours: pairs move from neighbours to halves apart, the gate comes before the value. ---


def halves_apart(rows: Tensor) -> Tensor:
    return torch.cat((rows[..., 0::2, :], rows[..., 1::2, :]), -2)


def permuted_qkv(weight: Tensor, heads: int) -> Tensor:
    q, k, v = weight.view(3, heads, -1, weight.shape[1])
    return torch.stack((halves_apart(q), halves_apart(k), v)).reshape(weight.shape)


def ours_from_author_v1(w: dict[str, Tensor], heads: int) -> dict[str, Tensor]:
    return {
        "attention_norm.weight": w["norm1.weight"],
        "attention_norm.bias": w["norm1.bias"],
        "attention.qkv.weight": permuted_qkv(w["attn.qkv.weight"], heads),
        "attention.proj.weight": w["attn.proj.weight"],
        "attention.proj.bias": w["attn.proj.bias"],
        "feed_forward_norm.weight": w["norm2.weight"],
        "feed_forward_norm.bias": w["norm2.bias"],
        "feed_forward.gate_up.weight": torch.cat((w["mlp.fc1.weight"], w["mlp.fc2.weight"])),
        "feed_forward.gate_up.bias": torch.cat((w["mlp.fc1.bias"], w["mlp.fc2.bias"])),
        "feed_forward.down.weight": w["mlp.fc3.weight"],
        "feed_forward.down.bias": w["mlp.fc3.bias"],
    }


def ours_from_v2(w: dict[str, Tensor], heads: int) -> dict[str, Tensor]:
    return {
        "norm.weight": w["norm1.weight"],
        "attention.qkv.weight": permuted_qkv(w["attn.qkv_proj.weight"], heads),
        "attention.q_norm": halves_apart(w["attn.norm_q.weight"][:, None])[:, 0],
        "attention.k_norm": halves_apart(w["attn.norm_k.weight"][:, None])[:, 0],
        "attention.proj.weight": w["attn.out_proj.weight"],
        "feed_forward.gate_up.weight": torch.cat(w["ffn.fc1.weight"].chunk(2)[::-1]),
        "feed_forward.down.weight": w["ffn.fc2.weight"],
        "scale": w["layer_scale.gamma"],
    }


def exact_table(kind: str, grid: tuple[int, int], head_dim: int) -> Tensor:
    """The rotary table in float64, so that nothing but the block's own arithmetic is compared."""
    index = torch.arange(math.prod(grid)).double()[:, None]
    if kind == "1d":
        angles = index * plain.frequencies(head_dim)
    else:
        rows, columns = index // grid[1], index % grid[1]
        angles = torch.cat((rows * plain.frequencies(head_dim // 2), columns * plain.frequencies(head_dim // 2)), -1)
    return torch.stack((angles.cos(), angles.sin()))


GRID = (3, 4)


@pytest.mark.parametrize("head_dim", [64, 72])
def test_author_v1_block_equals_its_formula(head_dim):
    heads, hidden = 2, 70
    width = heads * head_dim
    config = ViTokConfig.from_name(
        "S-B/16", preset="author-v1", encoder_width=width, encoder_heads=heads, encoder_hidden=hidden
    )
    block = SerialBlock(config, config.encoder).double()
    weights = plain.author_v1_weights(width, hidden)
    block.load_state_dict(ours_from_author_v1(weights, heads))
    x = torch.randn(2, math.prod(GRID), width, dtype=torch.float64)
    expected = plain.author_v1_block(x, weights, heads, GRID)
    assert (expected - x).abs().max() > 0.5, "the block must do something"
    torch.testing.assert_close(
        whole_block(block, x, exact_table("1d", GRID, head_dim)), expected, rtol=1e-12, atol=1e-12
    )


def test_v2_block_equals_its_formula():
    heads, head_dim, hidden = 2, 64, 80
    width = heads * head_dim
    config = ViTokConfig.from_name(
        "L-L/16", preset="v2", encoder_width=width, encoder_heads=heads, encoder_hidden=hidden
    )
    block = ParallelBlock(config, config.encoder).double()
    weights = plain.v2_weights(width, hidden, heads)
    block.load_state_dict(ours_from_v2(weights, heads))
    x = torch.randn(2, math.prod(GRID), width, dtype=torch.float64)
    expected = plain.v2_block(x, weights, heads, GRID)
    assert (expected - x).abs().max() > 0.1, "the block must do something"
    torch.testing.assert_close(
        whole_block(block, x, exact_table("2d", GRID, head_dim)), expected, rtol=1e-12, atol=1e-12
    )


def test_paper_block_equals_its_formula():
    """Layer norm, SiLU gate, no biases, a third of the head for each of t, y and x; in our own convention."""
    heads, d, hidden, grid = 2, 72, 64, (2, 2, 3)
    config = ViTokConfig.from_name("S-B/4x8", encoder_width=heads * d, encoder_heads=heads, encoder_hidden=hidden)
    block = SerialBlock(config, config.encoder).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    tokens = [(t, y, x) for t in range(2) for y in range(2) for x in range(3)]
    angles = torch.tensor(
        [[place[j // 12] * 10000.0 ** (-(j % 12) / 12) for j in range(36)] for place in tokens]
    ).double()
    cos, sin = angles.cos(), angles.sin()

    def turned(h: Tensor) -> Tensor:
        a, b = h[..., : d // 2], h[..., d // 2 :]
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    x = torch.randn(1, math.prod(grid), heads * d, dtype=torch.float64)
    w = dict(block.named_parameters())
    h = F.layer_norm(x, x.shape[-1:], w["attention_norm.weight"], w["attention_norm.bias"], 1e-5)
    q, k, v = plain.heads_of(h @ w["attention.qkv.weight"].T, heads)
    y = x + plain.softmax_attention(turned(q), turned(k), v) @ w["attention.proj.weight"].T
    h = F.layer_norm(y, x.shape[-1:], w["feed_forward_norm.weight"], w["feed_forward_norm.bias"], 1e-5)
    gate, up = (h @ w["feed_forward.gate_up.weight"].T).chunk(2, -1)
    expected = y + (gate * gate.sigmoid() * up) @ w["feed_forward.down.weight"].T
    torch.testing.assert_close(whole_block(block, x, torch.stack((cos, sin))), expected, rtol=1e-12, atol=1e-12)


def test_author_v1_model_equals_its_formula(pixels):
    """Convolution in, transposed convolution out, final norms, mean and log-variance; float64 throughout."""
    heads, width, hidden, depth, p, c = 2, 128, 70, 2, 8, 4
    sizes = {f"{s}_{k}": v for s in ("encoder", "decoder") for k, v in
             {"width": width, "heads": heads, "hidden": hidden, "depth": depth}.items()}  # fmt: skip
    model = vitok.create_model("S-B/8", preset="author-v1", channels=c, dtype=torch.float64, **sizes).eval()
    outer = plain.random_weights({
        "tubelet_embed.proj.weight": (width, 3, 1, p, p), "tubelet_embed.proj.bias": (width,),
        "encoder.norm.weight": (width,), "encoder.norm.bias": (width,), "decoder.norm.weight": (width,),
        "decoder.norm.bias": (width,), "encoder_to_code.weight": (2 * c, width), "encoder_to_code.bias": (2 * c,),
        "code_to_decoder.weight": (width, c), "code_to_decoder.bias": (width,),
        "tubelet_decode.proj.weight": (width, 3, 1, p, p), "tubelet_decode.proj.bias": (3,),
    })  # fmt: skip
    blocks = {side: [plain.author_v1_weights(width, hidden) for _ in range(depth)] for side in ("encoder", "decoder")}
    state = {
        "encoder.embed.weight": outer["tubelet_embed.proj.weight"].permute(0, 2, 3, 4, 1).flatten(1),
        "encoder.embed.bias": outer["tubelet_embed.proj.bias"],
        "encoder.bottleneck.to_moments.weight": outer["encoder_to_code.weight"],
        "encoder.bottleneck.to_moments.bias": outer["encoder_to_code.bias"],
        "decoder.from_latents.weight": outer["code_to_decoder.weight"],
        "decoder.from_latents.bias": outer["code_to_decoder.bias"],
        "decoder.unembed.weight": outer["tubelet_decode.proj.weight"].permute(2, 3, 4, 1, 0).flatten(0, 3),
        "decoder.unembed.bias": outer["tubelet_decode.proj.bias"],
    }
    for side, stack in blocks.items():
        state |= {f"{side}.stack.norm.{kind}": outer[f"{side}.norm.{kind}"] for kind in ("weight", "bias")}
        for i, weights in enumerate(stack):
            ours = ours_from_author_v1(weights, heads)
            state |= {f"{side}.stack.blocks.{i}.{key}": value for key, value in ours.items()}
    model.load_state_dict(state)

    picture = pixels(2, 3, GRID[0] * p, GRID[1] * p)

    def run(x: Tensor, side: str) -> Tensor:
        for weights in blocks[side]:
            x = plain.author_v1_block(x, weights, heads, GRID)
        return F.layer_norm(x, x.shape[-1:], outer[f"{side}.norm.weight"], outer[f"{side}.norm.bias"], 1e-5)

    clip = (picture.double() / 127.5 - 1)[:, :, None]
    embedded = F.conv3d(clip, outer["tubelet_embed.proj.weight"], outer["tubelet_embed.proj.bias"], stride=(1, p, p))
    code = run(embedded.flatten(2).mT, "encoder") @ outer["encoder_to_code.weight"].T + outer["encoder_to_code.bias"]
    mean, logvar = code.mT.unflatten(2, GRID).chunk(2, 1)
    tokens = run(mean.flatten(2).mT @ outer["code_to_decoder.weight"].T + outer["code_to_decoder.bias"], "decoder")
    decoded = F.conv_transpose3d(
        tokens.mT.unflatten(2, (1, *GRID)),
        outer["tubelet_decode.proj.weight"],
        outer["tubelet_decode.proj.bias"],
        (1, p, p),
    )[:, :, 0]

    posterior = model.encode(picture)
    # the model's rotary table is float32
    torch.testing.assert_close(posterior.mean, mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(posterior.logvar, logvar, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.decode(mean), decoded, rtol=1e-5, atol=1e-5)


def test_v2_model_equals_its_formula(pixels):
    """Linear patches in (channel, row, column) order, grey padding, a normalised code without a variance."""
    heads, width, hidden, depth, p, c = 2, 128, 80, 2, 8, 6
    sizes = {f"{s}_{k}": v for s in ("encoder", "decoder") for k, v in
             {"width": width, "heads": heads, "hidden": hidden, "depth": depth}.items()}  # fmt: skip
    model = vitok.create_model("L-L/8", preset="v2", channels=c, dtype=torch.float64, **sizes).eval()
    linear = {
        "patch_embed": (width, 3 * p * p),
        "to_code": (c, width),
        "decoder_embed": (width, c),
        "to_pixels": (3 * p * p, width),
    }
    outer = plain.random_weights(
        {f"{k}.weight": s for k, s in linear.items()} | {f"{k}.bias": s[:1] for k, s in linear.items()}
    )
    blocks = {side: [plain.v2_weights(width, hidden, heads) for _ in range(depth)] for side in ("encoder", "decoder")}

    def patch_order(rows: Tensor) -> Tensor:
        return rows.unflatten(0, (3, p, p)).movedim(0, 2).flatten(0, 2)

    state = {
        "encoder.embed.weight": patch_order(outer["patch_embed.weight"].T).T,
        "encoder.embed.bias": outer["patch_embed.bias"],
        "encoder.bottleneck.to_code.weight": outer["to_code.weight"],
        "encoder.bottleneck.to_code.bias": outer["to_code.bias"],
        "decoder.from_latents.weight": outer["decoder_embed.weight"],
        "decoder.from_latents.bias": outer["decoder_embed.bias"],
        "decoder.unembed.weight": patch_order(outer["to_pixels.weight"]),
        "decoder.unembed.bias": patch_order(outer["to_pixels.bias"]),
    }
    for side, stack in blocks.items():
        for i, weights in enumerate(stack):
            state |= {f"{side}.stack.blocks.{i}.{key}": value for key, value in ours_from_v2(weights, heads).items()}
    model.load_state_dict(state)

    picture = pixels(2, 3, 21, 30)
    padded = F.pad(picture.double() / 127.5 - 1, (0, 2, 0, 3))
    x = F.unfold(padded, p, stride=p).mT @ outer["patch_embed.weight"].T + outer["patch_embed.bias"]
    for weights in blocks["encoder"]:
        x = plain.v2_block(x, weights, heads, GRID)
    x = x @ outer["to_code.weight"].T + outer["to_code.bias"]
    code = (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-6)
    x = code @ outer["decoder_embed.weight"].T + outer["decoder_embed.bias"]
    for weights in blocks["decoder"]:
        x = plain.v2_block(x, weights, heads, GRID)
    patches = (x @ outer["to_pixels.weight"].T + outer["to_pixels.bias"]).mT
    decoded = F.fold(patches, (24, 32), p, stride=p)[:, :, :21, :30]

    latents = model.encode(picture).mode()
    torch.testing.assert_close(latents, code.mT.unflatten(2, GRID), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.decode(latents, size=(21, 30)), decoded, rtol=1e-5, atol=1e-5)


# --- What goes in and comes out ---


@pytest.mark.parametrize("preset", ["paper", "author-v1", "v2"])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (8, 8), (9, 16), (37, 211), (1, 400), (64, 3)])
def test_pictures_of_any_size_come_back_in_their_size(tiny, pixels, preset, height, width):
    model = tiny(preset=preset)
    posterior = model.encode(pixels(2, height, width, 3), layout="channels_last")
    assert posterior.mean.shape == (2, 4, math.ceil(height / 8), math.ceil(width / 8))
    reconstruction = model.decode(posterior.mode(), size=(height, width))
    assert reconstruction.shape == (2, 3, height, width) and reconstruction.isfinite().all()
    whole = model.decode(posterior.mode())
    assert whole.shape == (2, 3, 8 * math.ceil(height / 8), 8 * math.ceil(width / 8))
    assert torch.equal(whole[:, :, :height, :width], reconstruction)


@pytest.mark.parametrize("frames", [1, 4, 17])
def test_clips_of_any_length_come_back_in_their_length(tiny, pixels, frames):
    model = tiny("S-B/4x8")
    posterior = model.encode(pixels(1, frames, 13, 20, 3))
    assert posterior.mean.shape == (1, 4, math.ceil(frames / 4), 2, 3)
    assert model.decode(posterior.mode(), size=(frames, 13, 20)).shape == (1, 3, frames, 13, 20)
    assert model.decode(posterior.mode(), size=(13, 20)).shape == (1, 3, 4 * math.ceil(frames / 4), 13, 20)
    assert model.decode(posterior.mode()).shape == (1, 3, 4 * math.ceil(frames / 4), 16, 24)


def test_a_picture_is_a_clip_of_one_frame(tiny, pixels):
    model, picture = tiny(), pixels(2, 3, 20, 30)
    still, clip = model.encode(picture), model.encode(picture[:, :, None])
    assert torch.equal(still.mean, clip.mean[:, :, 0])
    assert torch.equal(still.sample(seed=3), clip.sample(seed=3)[:, :, 0])
    assert torch.equal(model.decode(still.mode()), model.decode(clip.mode())[:, :, 0])


def test_layouts_and_strides_are_one(tiny, pixels):
    model = tiny("S-B/4x8")
    picture, clip = pixels(2, 20, 30, 3), pixels(2, 6, 20, 30, 3)
    for last in (picture, clip):
        expected = model.encode(last).mean
        view = last.movedim(-1, 1)
        assert torch.equal(model.encode(view).mean, expected)
        assert torch.equal(model.encode(view.contiguous()).mean, expected)
        wide = last.repeat_interleave(2, dim=-2)
        assert torch.equal(model.encode(wide[..., ::2, :]).mean, expected)
        rgba = torch.cat((last, last[..., :1]), -1)
        assert torch.equal(model.encode(rgba[..., :3]).mean, expected)


def test_uint8_equals_its_float_picture_bit_for_bit(tiny, pixels):
    for dtype in (torch.float32, torch.bfloat16):
        model, picture = tiny().to(dtype), pixels(2, 3, 20, 30)
        posterior = model.encode(picture.float() * (2 / 255) - 1)
        assert posterior.mean.dtype == dtype and torch.equal(posterior.mean, model.encode(picture).mean)


def test_floats_of_any_width(tiny):
    model, picture = tiny(), 2 * torch.rand(1, 3, 20, 30) - 1
    expected = model.encode(picture).mean
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        actual = model.encode(picture.to(dtype)).mean
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual, expected, rtol=0.1, atol=0.1)


def test_padding_by_edge_and_by_zero(tiny, pixels):
    picture = pixels(1, 3, 13, 20).float() * (2 / 255) - 1
    for pad, mode in (("edge", "replicate"), ("zero", "constant")):
        model = tiny("S-B/1x8", pad=pad)
        by_hand = F.pad(picture, (0, 4, 0, 3), mode=mode)
        assert torch.equal(model.encode(picture).mean, model.encode(by_hand).mean)
        other = F.pad(picture, (0, 4, 0, 3), mode="constant", value=0.5)
        assert not torch.equal(model.encode(picture).mean, model.encode(other).mean)
    clip = pixels(1, 3, 6, 8, 8).float() * (2 / 255) - 1
    model = tiny("S-B/4x8")
    by_hand = torch.cat((clip, clip[:, :, -1:].expand(-1, -1, 2, -1, -1)), 2)
    assert torch.equal(model.encode(clip).mean, model.encode(by_hand).mean)


def test_positions_reach_the_tokens(tiny, pixels):
    """Without positions, permuting the tokens permutes the latents; with any kind, it does not."""
    picture = pixels(1, 3, 16, 24)
    mirrored = picture.unflatten(3, (3, 8)).flip(3).flatten(3)
    for fields in (
        {"rope": "none"},
        {"rope": "3d"},
        {"rope": "2d"},
        {"rope": "1d"},
        {"rope": "none", "absolute": "sincos"},
    ):
        model = tiny(**fields).double()
        same = torch.allclose(model.encode(mirrored).mean.flip(3), model.encode(picture).mean, atol=1e-9)
        assert same is (fields == {"rope": "none"})


def test_time_is_a_position_for_3d_and_not_for_2d(tiny):
    """Swapping frames swaps the tokens and nothing else exactly when time is no position."""
    tokens = torch.randn(1, 3, 96)
    for rope, alike in (("3d", False), ("2d", True), ("1d", False), ("none", True)):
        stack = tiny("S-B/4x8", rope=rope).decoder.stack
        swapped = stack(tokens[:, [1, 0, 2]], (3, 1, 1))[:, [1, 0, 2]]
        assert torch.allclose(swapped, stack(tokens, (3, 1, 1)), atol=1e-5) is alike


@pytest.mark.parametrize("preset", ["paper", "v2"])
def test_samples_of_a_batch_do_not_meet(tiny, pixels, preset):
    model, pictures = tiny(preset=preset).double(), pixels(3, 3, 20, 30)
    together = model.encode(pictures).mean
    for i in range(3):
        torch.testing.assert_close(model.encode(pictures[i : i + 1]).mean[0], together[i], rtol=1e-11, atol=1e-11)


def test_forward_gives_both(tiny, pixels):
    model = tiny()
    for batch, size in ((pixels(2, 3, 20, 30), (20, 30)), (pixels(2, 5, 20, 30, 3), (5, 20, 30))):
        reconstruction, posterior = model.eval()(batch)
        assert torch.equal(reconstruction, model.decode(posterior.mode(), size=size))
        assert posterior.mean.shape == model.encode(batch).mean.shape
        reconstruction, posterior = model.train()(batch, seed=5)
        assert torch.equal(reconstruction, model.decode(posterior.sample(seed=5), size=size))


def test_gradients_reach_every_parameter_and_the_pixels(tiny):
    for preset in ("paper", "author-v1", "v2"):
        model = tiny(preset=preset).train()
        picture = (2 * torch.rand(1, 3, 20, 30) - 1).requires_grad_()
        reconstruction, posterior = model(picture, seed=0)
        (reconstruction.square().mean() + posterior.kl().mean()).backward()
        idle = [
            key for key, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()
        ]
        assert idle == [] and picture.grad.abs().sum() > 0


@pytest.mark.parametrize("preset", ["paper", "author-v1", "v2"])
def test_compiles_whole(tiny, pixels, preset):
    torch.compiler.reset()
    model, picture = tiny("S-B/4x8" if preset != "v2" else "S-S/8", preset=preset), pixels(1, 5, 20, 30, 3)

    def whole(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        posterior = model.encode(x)
        return posterior.mean, posterior.sample(seed=3), model.decode(posterior.mode(), size=(5, 20, 30))

    with torch.no_grad():
        compiled = torch.compile(whole, fullgraph=True, backend="eager")(picture)
        for actual, expected in zip(compiled, whole(picture), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 3, 16, 3), (1, 3, 4, 16, 3), (2, 3, 3, 3), (1, 3, 16, 16, 3)])
def test_a_layout_that_could_be_either_is_asked_for(tiny, pixels, shape, one_sentence):
    model = tiny("S-B/4x8")
    with pytest.raises(InputError) as error:
        model.encode(pixels(*shape))
    one_sentence(error.value, str(list(shape)), "layout=")
    assert model.encode(pixels(*shape), layout="channels_first").mean.dim() == len(shape)
    assert model.encode(pixels(*shape), layout="channels_last").mean.dim() == len(shape)


def test_layout_by_name(tiny, pixels):
    model, picture = tiny(), pixels(1, 3, 16, 3)
    first, last = (model.encode(picture, layout=name).mean for name in ("channels_first", "channels_last"))
    assert first.shape == (1, 4, 2, 1) and last.shape == (1, 4, 1, 2)


@pytest.mark.parametrize(
    ("picture", "options", "message"),
    [
        (torch.zeros(16, 16, 3), {}, "4 dimensions (pictures) or 5 (clips), got shape [16, 16, 3]"),
        (torch.zeros(1, 1, 1, 3, 8, 8), {}, "4 dimensions (pictures) or 5 (clips)"),
        (torch.zeros(1, 4, 16, 16), {}, "3 colour channels"),
        (torch.zeros(1, 1, 16, 16), {}, "3 colour channels in dimension 1 or the last, got shape [1, 1, 16, 16]"),
        (torch.zeros(1, 16, 16, 4), {}, "3 colour channels"),
        (torch.zeros(1, 16, 16, 3), {"layout": "channels_first"}, "3 colour channels"),
        (torch.zeros(1, 3, 16, 16), {"layout": "channels_last"}, "3 colour channels"),
        (torch.zeros(1, 3, 16, 16), {"layout": "NHWC"}, "'auto', 'channels_first' or 'channels_last', got 'NHWC'"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.int32), {}, "uint8 or floating point, got torch.int32"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.bool), {}, "uint8 or floating point, got torch.bool"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.complex64), {}, "uint8 or floating point, got torch.complex64"),
        (torch.zeros(0, 3, 16, 16), {}, "must not be empty, got shape [0, 3, 16, 16]"),
        (torch.zeros(1, 3, 0, 16), {}, "must not be empty"),
        (torch.full((1, 3, 16, 16), math.nan), {}, "finite"),
        (torch.full((1, 3, 16, 16), -math.inf), {}, "finite"),
        (torch.full((1, 3, 16, 16), math.nan, dtype=torch.bfloat16), {}, "finite"),
        (torch.full((1, 3, 16, 16), math.nan, dtype=torch.float16), {}, "finite"),
        (torch.linspace(0, 255, 768).view(1, 3, 16, 16), {}, "[-1, 1], got values from 0 to 255; pass 0..255 as uint8"),
    ],
)
def test_bad_pixels(tiny, picture, options, message, one_sentence):
    with pytest.raises(InputError) as error:
        tiny().encode(picture, **options)
    one_sentence(error.value, message)


def test_one_nan_among_many_is_found_and_overshoot_is_allowed(tiny):
    picture = torch.zeros(1, 3, 64, 64)
    picture[0, 2, 40, 3] = 1.2
    tiny().encode(picture)
    picture[0, 1, 63, 63] = math.nan
    with pytest.raises(InputError, match="nan"):
        tiny().encode(picture)


@pytest.mark.parametrize(
    "latents",
    [
        torch.zeros(1, 5, 2, 2), torch.zeros(1, 16, 2, 2), torch.zeros(1, 4, 2), torch.zeros(4, 2, 2),
        torch.zeros(1, 4, 2, 2, dtype=torch.int64), torch.zeros(0, 4, 2, 2), torch.zeros(1, 4, 0, 2),
    ],
    ids=lambda x: f"{x.dtype}{list(x.shape)}",
)  # fmt: skip
def test_latents_of_another_model(tiny, latents, one_sentence):
    with pytest.raises(InputError) as error:
        tiny().decode(latents)
    one_sentence(error.value, "latents of S-S/8 must be floating point [B, 4, h, w]", str(list(latents.shape)))


@pytest.mark.parametrize("size", [(17, 24), (8, 24), (16, 25), (0, 24), (2, 16, 24), (16,), (1, 1, 16, 24)])
def test_sizes_that_do_not_fit_the_latents(tiny, size, one_sentence):
    with pytest.raises(InputError) as error:
        tiny().decode(torch.zeros(1, 4, 2, 3), size=size)
    one_sentence(error.value, str(size), "[1, 4, 1, 2, 3]")


def test_sizes_that_do_not_fit_the_latents_of_a_clip(tiny):
    model, latents = tiny("S-B/4x8"), torch.zeros(1, 4, 2, 2, 3)
    for frames in (4, 9):
        with pytest.raises(InputError, match="does not fit"):
            model.decode(latents, size=(frames, 16, 24))
    assert model.decode(latents, size=(5, 9, 17)).shape == (1, 3, 5, 9, 17)


# --- Posteriors ---


def test_gaussian_moments_are_clamped():
    posterior = GaussianPosterior(torch.zeros(1, 2, 1, 2), torch.tensor([-99.0, -3.0, 5.0, 99.0]).view(1, 2, 1, 2))
    assert posterior.logvar.flatten().tolist() == [-30, -3, 5, 20]
    torch.testing.assert_close(posterior.std, (posterior.logvar / 2).exp())
    assert posterior.mode() is posterior.mean


@pytest.mark.parametrize("shape", [(3, 4, 2, 5), (2, 4, 3, 2, 2)])
def test_kl_against_torch_distributions(shape):
    posterior = GaussianPosterior(torch.randn(shape).double(), torch.randn(shape).double())
    normal = torch.distributions.Normal(posterior.mean, posterior.std)
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).flatten(1).mean(1)
    torch.testing.assert_close(posterior.kl(), expected, rtol=1e-12, atol=1e-12)
    assert GaussianPosterior(torch.zeros(shape), torch.zeros(shape)).kl().tolist() == [0.0] * shape[0]


def test_kl_of_half_precision_moments_is_not_lost_to_rounding():
    logvar = torch.full((1, 4, 8, 8), 0.01).bfloat16()
    kl = GaussianPosterior(torch.zeros_like(logvar), logvar).kl()
    exact = GaussianPosterior(torch.zeros(1, 4, 8, 8).double(), logvar.double()).kl()
    assert kl.dtype == torch.float32
    torch.testing.assert_close(kl.double(), exact, rtol=1e-4, atol=0)


def test_sampling_is_reproducible_and_independent_of_the_batch(tiny, pixels):
    posterior = tiny().encode(pixels(4, 3, 20, 30))
    sample = posterior.sample(seed=11)
    assert torch.equal(sample, posterior.sample(seed=11)) and not torch.equal(sample, posterior.sample(seed=12))
    for i in range(4):
        alone = GaussianPosterior(posterior.mean[i : i + 1], posterior.logvar[i : i + 1])
        assert torch.equal(alone.sample(seed=11, sample_ids=torch.tensor([i]))[0], sample[i])
    noise = (sample - posterior.mean) / posterior.std
    assert not torch.allclose(noise[0], noise[1], atol=0.1)
    torch.manual_seed(0)
    first = posterior.sample()
    torch.manual_seed(0)
    assert torch.equal(posterior.sample(), first) and not torch.equal(posterior.sample(), first)


def test_sampling_follows_the_moments():
    mean, logvar = torch.full((1, 1, 200, 200), 3.0), torch.full((1, 1, 200, 200), math.log(4.0))
    sample = GaussianPosterior(mean, logvar).sample(seed=0)
    assert abs(sample.mean() - 3) < 4 * 2 / 200 and abs(sample.std() - 2) < 4 * 2 / 200


def test_noise_belongs_to_token_and_channel_in_that_order():
    zeros = torch.zeros(1, 4, 2, 3)
    sample = GaussianPosterior(zeros, zeros).sample(seed=9)
    flat = vitok.ops.normal_noise(9, torch.tensor([0]), 24)
    assert torch.equal(sample.movedim(1, -1).flatten(), flat[0])


def test_a_code_without_uncertainty(tiny, pixels):
    posterior = tiny(preset="v2").double().encode(pixels(2, 3, 20, 30))
    assert isinstance(posterior, PointPosterior)
    torch.testing.assert_close(posterior.mean.mean(1), torch.zeros(2, 3, 4).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(posterior.mean.var(1, unbiased=False), torch.ones(2, 3, 4).double(), rtol=0, atol=1e-3)
    assert posterior.sample(seed=1) is posterior.mode() is posterior.mean
    assert posterior.kl().tolist() == [0, 0] and not posterior.std.any() and (posterior.logvar == -math.inf).all()

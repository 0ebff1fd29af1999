"""Other tokenizers' call styles, written as their trainers write them."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import vitok
from vitok import InputError
from vitok.bottlenecks import PointPosterior
from vitok.integrations import backbone
from vitok.integrations.cosmos import CosmosTokenizer
from vitok.integrations.lightningdit import LightningDiTTokenizer
from vitok.integrations.llamagen import LlamaGenTokenizer
from vitok.integrations.published import Missing
from vitok.integrations.titok import TiTokTokenizer


class Quantised(PointPosterior):
    def __init__(self, latents: Tensor, ids: Tensor) -> None:
        super().__init__(latents)
        self.ids = ids


class Nearest(nn.Module):
    """The least that offers token ids: the nearest of a few codes."""

    codebook_size = 11

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.project, self.codes = nn.Linear(width, channels), nn.Parameter(torch.randn(11, channels))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.project(tokens)

    def lookup(self, ids: Tensor) -> Tensor:
        return self.codes[ids].movedim(-1, 1)

    def posterior(self, codes: Tensor, grid: tuple[int, ...]) -> Quantised:
        ids = torch.cdist(codes, self.codes.expand(len(codes), -1, -1)).argmin(-1).unflatten(1, grid)
        return Quantised(self.lookup(ids), ids)


@pytest.fixture
def discrete(tiny):
    def make(name: str = "S-S/8") -> vitok.ViTok:
        model = tiny(name)
        torch.manual_seed(0)
        model.encoder.bottleneck = Nearest(48, 4)
        return model.requires_grad_(False)

    return make


def pictures(*shape: int) -> Tensor:
    return torch.rand(shape) * 2 - 1


def test_titok(discrete):
    model, x = discrete(), pictures(2, 3, 32, 32)
    tok = TiTokTokenizer(model).eval()
    ids = tok.encode((x + 1) / 2)[1]["min_encoding_indices"]
    assert ids.shape == (2, 1, 16) and ids.dtype == torch.int64 and len(ids.unique()) > 1
    posterior = model.encode(x, layout="channels_first")
    assert torch.equal(ids, posterior.ids.reshape(2, 1, 16))
    expected = (model.decode(posterior.mode()) + 1) / 2
    for tokens in (ids, ids.squeeze(1), ids.int()):
        assert torch.equal(tok.decode_tokens(tokens), expected)
    z = tok.encode((x + 1) / 2)[0]
    assert z.shape == (2, 4, 1, 16) and torch.equal(tok.decode(z), expected)


def test_titok_of_other_grids(discrete, one_sentence):
    model, x = discrete(), pictures(2, 3, 16, 40)
    tok = TiTokTokenizer(model, grid=(2, 5))
    ids = tok.encode((x + 1) / 2)[1]["min_encoding_indices"]
    assert tok.decode_tokens(ids).shape == (2, 3, 16, 40)
    for call, words in (
        (
            lambda: TiTokTokenizer(model).decode_tokens(ids),
            "10 tokens do not fill a grid of (3, 3); name theirs by grid=",
        ),
        (lambda: tok.decode_tokens(ids[:, :, :-1]), "9 tokens do not fill a grid of (2, 5)"),
        (lambda: tok.decode_tokens(ids.view(2, 2, 5)), "tokens must be [B, 1, L] or [B, L], got [2, 2, 5]"),
        (lambda: tok.decode_tokens(ids + 11), "token ids must lie in 0 .. 10, got 1"),
        (lambda: tok.decode_tokens(-1 - ids), "token ids must lie in 0 .. 10, got -"),
        (lambda: tok.decode_tokens(ids.float()), "token ids must be integers"),
    ):
        with pytest.raises(InputError) as error:
            call()
        one_sentence(error.value, words)


def test_llamagen(discrete, one_sentence):
    model, x = discrete(), pictures(2, 3, 16, 40)
    vq = LlamaGenTokenizer(model).eval()
    quant, _, [_, _, ids] = vq.encode(x)
    assert quant.shape == (2, 4, 2, 5) and ids.shape == (20,) and ids.dtype == torch.int64
    expected = model.decode(model.encode(x, layout="channels_first").mode())
    assert torch.equal(vq.decode(quant), expected)
    assert torch.equal(vq.decode_code(ids, quant.shape), expected)
    assert torch.equal(vq.decode_code(ids.reshape(2, -1), [2, 4, 2, 5]), expected)  # as a generator hands them over
    assert torch.equal(vq.decode_code(ids, (2, 2, 5, 4), channel_first=False), expected)
    assert torch.equal(vq.decode_code(ids.view(2, 2, 5)), expected)
    for call, words in (
        (
            lambda: vq.decode_code(ids, (2, 8, 2, 5)),
            "shape (2, 8, 2, 5) does not fit 20 token ids and 4 latent channels",
        ),
        (lambda: vq.decode_code(ids, (2, 4, 5, 5)), "does not fit"),
        (lambda: vq.decode_code(ids), "without shape= token ids must be [B, h, w], got [20]"),
    ):
        with pytest.raises(InputError) as error:
            call()
        one_sentence(error.value, words)


@pytest.mark.parametrize(
    ("name", "shape", "grid"), [("S-S/8", (2, 3, 16, 24), (2, 3)), ("S-B/4x8", (1, 3, 8, 16, 24), (2, 2, 3))]
)
def test_cosmos(discrete, tiny, name, shape, grid):
    x = pictures(*shape)
    continuous = tiny(name)
    encoder = decoder = CosmosTokenizer(continuous)
    (latent,) = encoder.encode(x)
    assert latent.shape == (len(x), 4, *grid) and not latent.requires_grad
    assert torch.equal(latent, continuous.encode(x, layout="channels_first").mode())
    assert decoder.decode(latent).shape == shape and torch.equal(decoder.autoencode(x), decoder.decode(latent))
    encoder = decoder = CosmosTokenizer(discrete(name))
    indices, codes = encoder.encode(x)
    assert indices.shape == (len(x), *grid) and codes.shape == (len(x), 4, *grid) and not indices.is_floating_point()
    assert torch.equal(decoder.decode(indices), encoder.model.decode(codes)) and decoder.decode(indices).shape == shape


def test_one_half_is_enough(tiny, one_sentence):
    """Cosmos has encoder and decoder files of their own, as ViTok-v2 has."""
    whole, encoder, decoder = (tiny(preset="v2") for _ in range(3))
    encoder.decoder, decoder.encoder = Missing("decoder"), Missing("encoder")
    x = pictures(1, 3, 16, 24)
    (latent,) = CosmosTokenizer(encoder).encode(x)
    assert torch.equal(CosmosTokenizer(decoder).decode(latent), CosmosTokenizer(whole).autoencode(x))
    assert torch.equal(backbone(encoder)(x), backbone(whole)(x))
    for call in (lambda: backbone(decoder), lambda: CosmosTokenizer(decoder).encode(x)):
        with pytest.raises(InputError) as error:
            call()
        one_sentence(error.value, "loaded without its encoder")


def test_lightningdit(tiny):
    model, x = tiny(), pictures(2, 3, 16, 24)
    vae = LightningDiTTokenizer(model, img_size=16)
    torch.manual_seed(3)
    z = vae.encode_images(x)
    posterior = model.encode(x, layout="channels_first")
    torch.manual_seed(3)
    assert torch.equal(z, posterior.sample()) and not torch.equal(z, posterior.mode()) and not z.requires_grad
    images = vae.decode_to_images(z)
    assert isinstance(images, np.ndarray) and images.dtype == np.uint8 and images.shape == (2, 16, 24, 3)
    exact = (model.decode(z).double().clamp(-1, 1) * 127.5 + 127.5).round().permute(0, 2, 3, 1)
    assert np.abs(images - exact.detach().numpy()).max() <= 1


def test_lightningdit_transform(tiny, pixels):
    vae = LightningDiTTokenizer(tiny())
    source = pixels(20, 31, 3)
    picture = Image.fromarray(source.numpy())
    transform = pickle.loads(pickle.dumps(vae.img_transform(img_size=10)))
    x = transform(picture)
    assert x.shape == (3, 10, 10) and x.dtype == torch.float32 and x.abs().max() <= 1
    expected = vitok.io.resize_and_crop(source, 10).permute(2, 0, 1).float() / 127.5 - 1
    assert torch.allclose(x, expected, atol=1e-6)
    assert torch.equal(vae.img_transform(1.0, 10)(picture), x.flip(2))
    both = {vae.img_transform(0.5, 10)(picture)[:, :, 0].sum().item() for _ in range(20)}
    assert len(both) == 2
    assert vae.img_transform()(picture.convert("L")).shape == (3, 256, 256)


@pytest.mark.parametrize("adapter", [TiTokTokenizer, LlamaGenTokenizer])
@pytest.mark.parametrize("preset", ["paper", "v2"])
def test_continuous_models_are_refused(adapter, preset, tiny, one_sentence):
    with pytest.raises(InputError) as error:
        adapter(tiny(preset=preset))
    one_sentence(error.value, adapter.__name__, "wants a model of token ids", "are continuous")


@pytest.mark.parametrize("adapter", [CosmosTokenizer, LightningDiTTokenizer])
def test_adapters_are_modules_and_take_names(adapter):
    model = adapter("demo").bfloat16().requires_grad_(False)
    assert model.model.dtype == torch.bfloat16 and not model.training
    with pytest.raises(InputError):
        adapter("nowhere")


def test_the_page_runs():
    page = Path(__file__).parents[2] / "docs" / "integrations" / "tokenizers.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    names: dict[str, object] = {}
    exec(code, names)
    assert names["images"].shape == (1, 128, 128, 3) and names["latent"].shape == (1, 64, 8, 8)

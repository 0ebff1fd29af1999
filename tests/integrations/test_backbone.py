"""The encoder as a feature extractor: what timm asks of its models, and what its FeatureGetterNet does with them."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch

import vitok
from vitok import InputError
from vitok.integrations import backbone


@pytest.fixture(params=["paper", "author-v1", "v2"])
def model(request, tiny) -> vitok.ViTok:
    return tiny(preset=request.param, encoder_depth=3)


@pytest.fixture
def picture() -> torch.Tensor:
    return torch.rand(2, 3, 27, 40) * 2 - 1  # rows that are no multiple of the patch


def judged(model: vitok.ViTok, picture: torch.Tensor) -> list[torch.Tensor]:
    """The residual stream after each block, by hooks, and the final tokens last."""
    seen: list[torch.Tensor] = []

    def note(module, inputs, outputs):
        x, (out, scale) = outputs
        seen.append(x + (out if scale is None else out * scale))

    hooks = [block.register_forward_hook(note) for block in model.encoder.stack.blocks]
    hooks.append(model.encoder.stack.register_forward_hook(lambda m, inputs, out: seen.append(out)))
    model.encode(picture, layout="channels_first")
    for hook in hooks:
        hook.remove()
    return seen


@torch.no_grad()
def test_features_are_those_of_the_encoder(model, picture):
    *each, final = judged(model, picture)
    features = backbone(model)
    assert torch.equal(features(picture), final) and torch.equal(features.forward_features(picture), final)
    assert final.shape == (2, 4 * 5, features.num_features)
    codes = model.encoder.bottleneck(final)
    assert torch.equal(model.encoder.bottleneck.posterior(codes, (4, 5)).mode(), model.encode(picture).mode())
    last, found = features.forward_intermediates(picture)
    assert torch.equal(last, final) and len(found) == 3
    for got, wanted in zip(found, each, strict=True):
        assert torch.equal(got, wanted.transpose(1, 2).reshape(2, -1, 4, 5)) and got.is_contiguous()


@torch.no_grad()
def test_indices_formats_and_norm(model, picture):
    features = backbone(model)
    final, each = features.forward_intermediates(picture, output_fmt="NLC")

    def take(indices, **options):
        return features.forward_intermediates(
            picture, indices, output_fmt="NLC", intermediates_only=True, **options
        )  # fmt: skip

    for indices, wanted in ((1, [2]), (2, [1, 2]), ([0, 2], [0, 2]), ([-1, 0], [0, 2]), ((-3,), [0])):
        for stop_early in (False, True):
            got = take(indices, stop_early=stop_early)
            assert len(got) == len(wanted) and all(torch.equal(x, each[i]) for x, i in zip(got, wanted, strict=True))
    assert torch.equal(take(1, norm=True)[0], final)
    if features.stack.norm is not None:
        assert not torch.equal(take([0], norm=True)[0], each[0])


@torch.no_grad()
def test_stopping_early_leaves_out_blocks(model, picture):
    features, ran = backbone(model), []
    for number, block in enumerate(features.stack.blocks):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    features.forward_intermediates(picture, [0], stop_early=True, intermediates_only=True)
    assert ran == [0]
    features.forward_intermediates(picture, [0], intermediates_only=True)
    assert ran == [0, 0, 1, 2]


@torch.no_grad()
def test_clips(tiny):
    model = tiny("S-B/4x8")
    clip = torch.rand(2, 3, 7, 16, 24) * 2 - 1
    features = backbone(model)
    final, found = features.forward_intermediates(clip, 1, norm=True)
    assert final.shape == (2, 2 * 2 * 3, 48) and found[0].shape == (2, 48, 2, 2, 3)
    assert torch.equal(found[0].flatten(2).transpose(1, 2), final)
    bytes_ = torch.randint(0, 256, (1, 3, 4, 8, 8), dtype=torch.uint8)
    assert torch.allclose(features(bytes_), features(bytes_.float() / 127.5 - 1), atol=1e-5)


def test_info_is_what_timm_reads(model):
    """timm.models.FeatureInfo wants these keys, and reductions that never shrink."""
    info = backbone(model).feature_info
    assert [set(entry) for entry in info] == [{"num_chs", "reduction", "module", "index"}] * 3
    modules = dict(backbone(model).named_modules())
    assert all(entry["module"] in modules and entry["reduction"] == 8 and entry["num_chs"] == 48 for entry in info)


@torch.no_grad()
def test_pruning_keeps_the_features_and_the_model(model, picture):
    whole = backbone(model)
    expected = whole.forward_intermediates(picture, [0, -2], intermediates_only=True)
    features = backbone(model)
    kept = features.prune_intermediate_layers([0, -2], prune_norm=True)
    assert kept == [0, 1] and len(features.stack.blocks) == 2 == len(features.feature_info)
    got = features.forward_intermediates(picture, kept, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert len(model.encoder.stack.blocks) == 3 and not any(key == "norm.weight" for key in features.stack.state_dict())
    assert torch.equal(backbone(model)(picture), whole(picture))


def test_training_reaches_every_parameter(model, picture):
    features = backbone(model).train()
    (features(picture).square().mean()).backward()
    gradients = {key: p.grad.clone() for key, p in features.named_parameters()}
    assert all(gradient.abs().sum() > 0 for gradient in gradients.values())
    features.zero_grad()
    features.set_grad_checkpointing()
    features(picture).square().mean().backward()
    assert all(torch.allclose(p.grad, gradients[key], rtol=1e-4, atol=1e-6) for key, p in features.named_parameters())


def test_checkpointing_keeps_less(model, picture):
    def kept(features) -> int:
        numbers: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: numbers.append(x.numel()) or x, lambda x: x):
            features(picture)
        return sum(numbers)

    features = backbone(model)
    plain = kept(features)
    features.set_grad_checkpointing()
    assert kept(features) < plain / 2


def test_it_is_an_ordinary_module(model, picture, tmp_path):
    features = backbone(model)
    assert not any("bottleneck" in key or "decoder" in key for key in features.state_dict())
    torch.save(features.state_dict(), tmp_path / "features.pt")
    again = copy.deepcopy(features).bfloat16()
    assert again(picture.bfloat16()).dtype == torch.bfloat16
    assert next(features.parameters()) is model.encoder.embed.weight


def test_of_a_name_the_decoder_is_dropped(model, picture, tmp_path):
    model.save(tmp_path / "model")
    features = backbone(tmp_path / "model")
    assert torch.equal(features(picture), backbone(model)(picture))
    parameters = sum(p.numel() for p in model.encoder.parameters()) - sum(
        p.numel() for p in model.encoder.bottleneck.parameters()
    )
    assert sum(p.numel() for p in features.parameters()) == parameters


def test_what_cannot_be(tiny, picture, one_sentence):
    features = backbone(tiny())
    for call, words in (
        (lambda: features.forward_intermediates(picture, [2]), "of the 2 blocks"),
        (lambda: features.forward_intermediates(picture, 3), "of the 2 blocks"),
        (lambda: features.forward_intermediates(picture, 0), "of the 2 blocks"),
        (lambda: features.forward_intermediates(picture, [-3]), "of the 2 blocks"),
        (lambda: features.prune_intermediate_layers([]), "of the 2 blocks"),
        (lambda: features.forward_intermediates(picture, output_fmt="NHWC"), "output_fmt must be one of NCHW, NLC"),
        (lambda: features(picture.permute(0, 2, 3, 1)), "3 colour channels"),
        (lambda: features(picture * 255), "must be finite and lie in [-1, 1]"),
        (lambda: backbone("nowhere"), "no weights 'nowhere'"),
        (lambda: backbone(tiny().for_inference()), "for_inference"),
    ):
        with pytest.raises(InputError) as error:
            call()
        one_sentence(error.value, words)


def test_timm_takes_it(model, picture):
    timm = pytest.importorskip(
        "timm", reason="timm, or the torchvision it needs, is not installed", exc_type=ImportError
    )
    net = timm.models._features.FeatureGetterNet(backbone(model), out_indices=[0, -1], norm=True)
    found = net(picture)
    assert net.feature_info.channels() == [48, 48] and net.feature_info.reduction() == [8, 8]
    assert [tuple(x.shape) for x in found] == [(2, 48, 4, 5)] * 2


def test_the_page_runs(tmp_path, monkeypatch):
    page = Path(__file__).parents[2] / "docs" / "integrations" / "backbone.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    names: dict[str, object] = {}
    exec(code, names)
    assert [tuple(x.shape) for x in names["pyramid"]] == [(2, 256, 8, 12)] * 2

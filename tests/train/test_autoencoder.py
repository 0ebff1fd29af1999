"""What a step computes: recomputation and compilation change nothing, a frozen encoder stays, noise is what it says."""

from __future__ import annotations

import copy

import pytest
import torch

import vitok
from vitok.train.autoencoder import Autoencoder
from vitok.train.trainer import Trainer


@pytest.fixture
def clips(pixels):
    return pixels(3, 1, 24, 16, 3)


def gradients(coder: Autoencoder, clips: torch.Tensor, **how: object) -> list[torch.Tensor]:
    coder.train().zero_grad()
    rows, kl = coder(clips, **how)
    (rows.square().mean() + kl.mean()).backward()
    return [p.grad.clone() for p in coder.parameters() if p.grad is not None]


def test_it_is_the_model(tiny, clips):
    model = tiny().eval()
    coder = Autoencoder(model)
    rows, kl = coder(clips)
    posterior = model.encode(clips, layout="channels_last")
    assert torch.equal(rows, model.decode_patches(posterior.mode()))
    assert torch.equal(kl, posterior.kl())
    assert torch.equal(coder(clips, 7)[0], model.decode_patches(posterior.sample(7)))


def test_samples_have_their_own_noise_in_any_part_of_a_batch(tiny, clips):
    coder = Autoencoder(tiny(), noise=0.5)
    whole, _ = coder(clips, 7)
    part, _ = coder(clips[1:], 7, torch.tensor([1, 2]))
    torch.testing.assert_close(part, whole[1:], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(whole, coder(clips, 8)[0])


def test_latent_noise_has_the_spread_it_says(tiny, pixels):
    clips = pixels(1, 1, 24, 24, 3).expand(2000, -1, -1, -1, -1)
    model = tiny()
    seen = []
    model.decode_patches = lambda latents: seen.append(latents) or latents  # type: ignore[method-assign]
    for noise in (0.0, 0.3):
        Autoencoder(model, noise=noise)(clips, 5)
    added = (seen[1] - seen[0]).flatten(1)
    each = added.std(1)
    # The size is |N(0, 0.3)|, so its square is 0.09 on average, and its mean 0.3 sqrt(2 / pi).
    assert added.square().mean().item() == pytest.approx(0.09, rel=0.1)
    assert each.mean().item() == pytest.approx(0.3 * (2 / torch.pi) ** 0.5, rel=0.1)
    plain, noisy = (Autoencoder(model, noise=noise)(clips[:4])[0] for noise in (0.0, 0.3))
    assert torch.equal(plain, noisy), "none without a seed"


def test_recomputing_gives_the_same_gradients_and_keeps_less(tiny, clips):
    def kept(coder: Autoencoder) -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.nbytes) or x, lambda x: x):
            coder.train()(clips, 1)
        return sum(sizes)

    plain = Autoencoder(tiny(encoder_depth=4, decoder_depth=4))
    again = copy.deepcopy(plain)
    again.recompute()
    for a, b in zip(gradients(plain, clips, seed=1), gradients(again, clips, seed=1), strict=True):
        assert torch.equal(a, b)
    assert kept(again) < 0.5 * kept(plain)


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_a_frozen_encoder_stays(tiny, clips, noise):
    coder = Autoencoder(tiny(), frozen=True, noise=noise).train()
    assert coder.model.decoder.training and not coder.model.encoder.training
    gradients(coder, clips, seed=0)
    assert all(p.grad is None for p in coder.model.encoder.parameters())
    assert all(p.grad is not None for p in coder.model.decoder.parameters())


def test_training_the_decoder_alone(config, tmp_path, sizes):
    vitok.create_model("S-S/8", channels=4, **sizes).save(tmp_path / "start")
    run = Trainer(config(init=str(tmp_path / "start"), freeze_encoder=True, latent_noise=0.2))
    run.run()
    exported, first = vitok.load(run.out / "model"), vitok.load(tmp_path / "start")
    for name, parameter in exported.named_parameters():
        assert torch.equal(parameter, first.state_dict()[name]) == name.startswith("encoder."), name


def test_parts_of_a_batch_and_recomputing_do_not_change_a_run(config):
    losses: dict[str, list[float]] = {}
    kinds = {"whole": {}, "parts": {"accumulate": 4}, "recomputed": {"checkpointing": True}}
    for name, fields in kinds.items():
        found = losses.setdefault(name, [])
        run = Trainer(config(name, learning_rate=1e-4, **fields))
        run.run(lambda step, metrics, found=found: found.append(metrics["loss"]))
    assert losses["recomputed"] == losses["whole"]
    assert losses["parts"] == pytest.approx(losses["whole"], rel=1e-4)
    assert Trainer(config("parts", learning_rate=1e-4, checkpointing=True)).step == 6, "a run may go on otherwise"


@pytest.mark.long
@pytest.mark.parametrize("fields", [{}, {"checkpointing": True}])
def test_compiled_blocks_do_not_change_a_run(config, fields):
    losses: dict[bool, list[float]] = {False: [], True: []}
    for compiled, found in losses.items():
        run = Trainer(config(f"run{compiled}", learning_rate=1e-4, steps=3, compile=compiled, **fields))
        run.run(lambda step, metrics, found=found: found.append(metrics["loss"]))
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)

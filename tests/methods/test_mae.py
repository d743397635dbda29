"""MAE: its loss by hand, patch by patch; masks that the encoder cannot see through; the picture."""

import math
from dataclasses import replace
from statistics import fmean, variance
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kit import tiny
from sslx import encoders, rng
from sslx.data.batch import Batch
from sslx.data.draws import Draws
from sslx.errors import ConfigError
from sslx.methods import mae
from sslx.methods.base import Embedded

SIZE, PATCH, GRID = 16, 4, 4
NUM = GRID * GRID
VIT = {"name": "vit_tiny_patch16_224", "patch": PATCH, "layers": (2,), "channels": (16,)}
OTHER_VITS = ["vit_small_patch14_reg4_dinov2", "vit_medium_patch16_gap_240", "vit_little_patch16_reg4_gap_256"]


def build(*others: int, **options: Any) -> encoders.Encoder:
    rng.seed_torch(0)
    return encoders.build(encoders.Config(**{**VIT, **options}), SIZE, *others)


def make(*others: int, **options: Any) -> mae.Method:
    """In fp64, with tokens that are no longer nearly the same; others: the other sizes that its encoder takes."""
    encoder = build(*others)
    method = mae.Method(mae.Config(**{"decoder_dim": 16, "decoder_layers": 2, **options}), encoder).double()
    for token in (encoder.trunk.cls_token, encoder.trunk.pos_embed, method.mask_token):
        token.data.normal_()
    return method


def batch(generator: torch.Generator, size: int = 3, dtype: torch.dtype = torch.float64) -> Batch:
    """Draws as of a mask_ratio of 0.75."""
    images = torch.randn(size, 3, SIZE, SIZE, generator=generator, dtype=dtype) * 2 + 1
    places = torch.rand(size, NUM, generator=generator).argsort(1)
    return Batch((images,), None, torch.arange(size), (places[:, : NUM // 4], places[:, NUM // 4 :]))


def pixels(images: Tensor, place: int) -> Tensor:
    """The patch at a place of (..., 3, SIZE, SIZE), places counted row by row; writing to it writes to the images."""
    row, column = divmod(place, GRID)
    return images[..., PATCH * row : PATCH * (row + 1), PATCH * column : PATCH * (column + 1)]


def places(images: Batch, sample: int) -> tuple[list[int], list[int]]:
    """The visible and the masked ones of a sample."""
    visible, masked = (draw[sample].tolist() for draw in images.draws)
    return sorted(visible), masked


def by_hand(method: mae.Method, images: Batch, sample: int) -> Tensor:
    """The loss of one image, its tokens put back in their places before they are decoded."""
    trunk, image = method.encoder.trunk, images.views[0][sample]
    visible, masked = (draw[sample].tolist() for draw in images.draws)
    tokens = [trunk.cls_token[0, 0] + trunk.pos_embed[0, 0]]
    for place in visible:
        embedded = [(weight * pixels(image, place)).sum() for weight in trunk.patch_embed.proj.weight]
        tokens.append(torch.stack(embedded) + trunk.patch_embed.proj.bias + trunk.pos_embed[0, 1 + place])
    seen = method.decoder_embed(trunk.norm(trunk.blocks(torch.stack(tokens)[None])))[0]
    whole = [seen[0], *[method.mask_token[0, 0]] * NUM]
    for place, token in zip(visible, seen[1:], strict=True):
        whole[1 + place] = token
    positions = F.pad(method.positions[0], (0, 0, 1, 0))
    predicted = method.decoder((torch.stack(whole) + positions)[None])[0, 1:]
    errors: list[Tensor] = []
    for place in masked:
        target = pixels(image, place).flatten().tolist()
        if method.config.normalize_target:
            mean, std = fmean(target), math.sqrt(variance(target) + 1e-6)
            target = [(value - mean) / std for value in target]
        errors += [(p - t) ** 2 for p, t in zip(predicted[place].unbind(), target, strict=True)]
    return torch.stack(errors).mean()


@pytest.mark.parametrize("others", [(), (24,)], ids=["one size", "any size"])
@pytest.mark.parametrize("normalize", [True, False])
def test_the_loss_and_its_gradients_are_those_of_the_masked_patches_by_hand(
    normalize: bool, others: tuple[int, ...], generator: torch.Generator
):
    method, images = make(*others, normalize_target=normalize), batch(generator)
    expected = torch.stack([by_hand(method, images, sample) for sample in range(3)]).mean()
    loss = method(images).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    parameters = [p for p in method.parameters() if p.requires_grad]
    for ours, truth in zip(*(torch.autograd.grad(x, parameters) for x in (loss, expected)), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-8, atol=1e-12)


def test_patches_are_cut_row_by_row_and_in_fp32(generator: torch.Generator):
    images = torch.randn(2, 3, SIZE, SIZE, generator=generator)
    patches = mae.patchify(images.bfloat16(), PATCH)
    assert (patches.shape, patches.dtype) == ((2, NUM, 48), torch.float32)
    for place in range(NUM):
        assert torch.equal(patches[:, place], pixels(images.bfloat16().float(), place).flatten(1))
    assert torch.equal(mae.patchify(images, 1), images.flatten(2).mT)
    for form in (images, images.contiguous(memory_format=torch.channels_last), images[:, :, :-1, 1:]):
        assert torch.equal(mae.patchify(form, PATCH), F.unfold(form, PATCH, stride=PATCH).mT)


def test_the_decoders_positions_are_sines_and_cosines_of_row_and_column():
    method = mae.Method(mae.Config(decoder_dim=16, decoder_layers=1), build())
    assert method.positions.shape == (1, NUM, 16)
    for place in range(NUM):
        row, column = divmod(place, GRID)
        angles = [where / 10000 ** (k / 4) for where in (row, column) for k in range(4)]
        expected = [*map(math.sin, angles), *map(math.cos, angles)]
        assert method.positions[0, place].tolist() == pytest.approx(expected, abs=1e-6)
    assert "positions" not in method.state_dict()
    assert not method.positions.requires_grad


def test_the_decoder_starts_as_in_the_papers_code():
    assert mae.Config().decoder_heads == 16
    method = mae.Method(mae.Config(decoder_dim=64, decoder_layers=3), build())
    assert [block.attn.num_heads for block in method.decoder[:3]] == [2] * 3
    assert tiny.linear_widths(method.decoder) == [*[(64, 192), (64, 64), (64, 256), (256, 64)] * 3, (64, 48)]
    for layer in (method.decoder_embed, *(each for each in method.decoder.modules() if isinstance(each, nn.Linear))):
        limit = math.sqrt(6 / sum(layer.weight.shape))
        assert 0.97 * limit < layer.weight.abs().max() <= limit
        assert layer.weight.std().item() == pytest.approx(limit / math.sqrt(3), rel=0.1)
        assert not layer.bias.any()
    assert method.mask_token.std().item() == pytest.approx(0.02, rel=0.5)


def test_the_encoders_weights_which_may_be_loaded_ones_stay_as_they_are():
    encoder = build()
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    mae.Method(mae.Config(decoder_dim=16), encoder)
    torch.testing.assert_close(encoder.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", OTHER_VITS)
def test_a_vit_with_other_prefix_tokens_is_trained_in_every_parameter(name: str, generator: torch.Generator):
    """Registers, or no class token, and a norm that comes after the pooling: the latter is not part of tokens."""
    encoder = build(name=name)
    method = mae.Method(mae.Config(decoder_dim=16, decoder_layers=2), encoder).double()
    images = batch(generator)
    method(images).loss.backward()
    frozen = {key for key, p in method.named_parameters() if not p.requires_grad}
    assert {key for key, p in method.named_parameters() if p.grad is None} == frozen
    assert {key.split(".")[2] for key in frozen} <= {"fc_norm"}
    assert bool(frozen) == isinstance(method.encoder_norm, nn.LayerNorm)
    seen: list[Tensor] = []
    method.decoder_embed.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    method.embed(images)
    torch.testing.assert_close(seen[0].mean(-1), torch.zeros(seen[0].shape[:2], dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [VIT["name"], *OTHER_VITS])
def test_predictions_depend_on_visible_pixels_and_on_no_masked_one(name: str, generator: torch.Generator):
    method = mae.Method(mae.Config(decoder_dim=16, decoder_layers=2), build(name=name)).double()
    images = batch(generator)
    (prediction,), (target,) = method.embed(images)
    assert prediction.shape == target.shape == (3, 12, 48)
    for place in range(NUM):
        changed = images.views[0].clone()
        pixels(changed, place).mul_(-1).add_(torch.linspace(0, 1, PATCH))
        (again,), (its_target,) = method.embed(replace(images, views=(changed,)))
        for sample in range(3):
            _, masked = places(images, sample)
            assert torch.equal(again[sample], prediction[sample]) == (place in masked)
            differs = [not torch.equal(a, b) for a, b in zip(target[sample], its_target[sample], strict=True)]
            assert differs == [other == place for other in masked]


def test_the_other_samples_of_a_batch_do_not_matter(generator: torch.Generator):
    method, images = make(), batch(generator)
    whole = method.embed(images)
    for i in range(3):
        alone = method.embed(tiny.part(images, slice(i, i + 1)))
        torch.testing.assert_close(sum(alone, ()), tuple(z[i : i + 1] for z in sum(whole, ())), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("ratio", "num_masked"), [(0.75, 12), (0.5, 8), (0.6, 10), (0.9, 15), (0.01, 1)])
def test_the_patches_with_the_largest_numbers_are_masked(ratio: float, num_masked: int, generator: torch.Generator):
    method, images = make(mask_ratio=ratio), batch(generator)
    seed = int(torch.randint(1 << 30, (), generator=generator))
    draws = Draws(seed=seed, epoch=0, batch=0, index=images.index.numpy())
    visible, masked = map(torch.from_numpy, method.draw(draws))
    picture = method.picture(replace(images, draws=(visible, masked)))[1][1]
    gray = mae.patchify(picture, PATCH).abs().amax(2) == 0
    for sample, numbers in enumerate(draws.per_sample(NUM).tolist()):
        order = sorted(range(NUM), key=numbers.__getitem__)
        assert visible[sample].tolist() + masked[sample].tolist() == order
        assert gray[sample].nonzero().flatten().tolist() == sorted(order[NUM - num_masked :])


def test_every_patch_is_masked_as_often_as_any(generator: torch.Generator):
    method = make(decoder_layers=1)
    masks = torch.zeros(20_000, NUM).scatter_(1, tiny.drawn(method, 20_000, generator)[1], 1.0)
    assert len(masks[:1000].unique(dim=0)) > 600  # of the 1820 that there are
    assert (masks.double().mean(0) - 0.75).abs().max() < 6 * math.sqrt(0.75 * 0.25 / 20_000)


@pytest.mark.parametrize("normalize", [True, False])
def test_the_picture_shows_visible_patches_as_they_are_and_predictions_in_their_places(
    normalize: bool, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
):
    method, images = make(normalize_target=normalize), batch(generator)
    (view,), (target,) = images.views, method.embed(images).given
    (first, image), (_, masked), (last, reconstruction) = method.picture(images)
    assert (first, last) == ("image", "reconstruction")
    assert torch.equal(image, view)
    for i in range(3):
        for shown in (masked, reconstruction):
            same = [place for place in range(NUM) if torch.equal(pixels(shown[i], place), pixels(view[i], place))]
            assert same == places(images, i)[0]
    monkeypatch.setattr(method, "_predict", lambda *_: target)  # the best that it can do
    torch.testing.assert_close(method.picture(images)[2][1], view)


def test_the_reconstruction_error_is_one_where_nothing_but_the_mean_is_predicted(generator: torch.Generator):
    (target,) = make().embed(batch(generator)).given
    target[0] = 0  # patches of one color
    step = make().loss(Embedded((torch.zeros_like(target),), (target,)))
    assert step.metrics["reconstruction_error"].item() == pytest.approx(1)
    assert step.loss.item() == pytest.approx(target.square().mean().item())
    assert make().loss(Embedded((target,), (target,))).metrics["reconstruction_error"] == 0


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_patches_of_one_color_are_finite_in_bf16(patch: int, generator: torch.Generator):
    """facebookresearch/mae#65: the variance of such patches is 0."""
    method = mae.Method(mae.Config(decoder_dim=16, decoder_layers=1), build(patch=patch))
    images = torch.randn(4, 3, 1, 1, generator=generator).expand(-1, -1, SIZE, SIZE).bfloat16()
    draws = tiny.drawn(method, 4, generator)
    for view in (images, images[:, :1].expand(-1, 3, -1, -1), torch.zeros_like(images)):
        with torch.autocast("cpu", torch.bfloat16):
            step = method(Batch((view,), None, torch.arange(4), draws))
        step.loss.backward()
        assert step.loss.isfinite()
        assert step.metrics["reconstruction_error"].isfinite()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters())


def test_a_resnet_and_too_few_patches_are_refused_in_one_line():
    with pytest.raises(ConfigError, match=r"^mae needs a ViT, not ResNet: [^\n]*$"):
        tiny.build(mae.Config(), tiny.RESNET)
    with pytest.raises(ConfigError, match=r"^mae needs patches to see [^\n]* of 4, mask_ratio 0.8 leaves 0 [^\n]*$"):
        mae.Method(mae.Config(mask_ratio=0.8), build(patch=8))

"""Tokens of ViTs with and without class and register tokens, against timm's forward and against sums by hand."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kit.errors import raises_one_line
from kit.tiny import RESNET
from sslx.encoders import Config, Encoder, Recipe, build, rebuild
from sslx.errors import ConfigError

SIZE, PATCH, GRID = 16, 4, 4
NUM = GRID * GRID
SHAPE: dict[str, Any] = {"patch": PATCH, "layers": (2,), "channels": (16,)}
NO_CLASS_TOKEN = Recipe(
    name="vit_small_patch16_224",
    size=SIZE,
    arguments={"img_size": SIZE, "patch_size": PATCH, "depth": 2, "embed_dim": 16, "num_heads": 1,
               "class_token": False, "global_pool": "avg"},
)  # fmt: skip
MODELS: dict[str, str | Recipe] = {
    "class token": "vit_tiny_patch16_224",
    "registers": "vit_small_patch14_reg4_dinov2",
    "registers, no class token": "vit_little_patch16_reg4_gap_256",
    "no class token": "vit_medium_patch16_gap_240",
    "no class token, by arguments": NO_CLASS_TOKEN,
    "distillation token": "deit_tiny_distilled_patch16_224",
    "class token without a position": "deit3_small_patch16_224",
    "norm before the blocks": "vit_base_patch16_clip_224",
    "attention pooling": "vit_base_patch16_siglip_224",
}
PREFIX = dict(zip(MODELS, (1, 5, 4, 0, 0, 2, 1, 1, 0), strict=True))
every_model = pytest.mark.parametrize("model", MODELS)


def make(model: str, *others: int) -> Encoder:
    """A small encoder in fp64, every parameter of which matters."""
    source = MODELS[model]
    encoder = (
        rebuild(source, *others) if isinstance(source, Recipe) else build(Config(name=source, **SHAPE), SIZE, *others)
    )
    encoder = encoder.double().eval()
    for parameter in encoder.parameters():
        parameter.data.normal_(std=0.3)
    return encoder


def images(generator: torch.Generator, size: int = SIZE) -> Tensor:
    return torch.randn(3, 3, size, size, generator=generator, dtype=torch.float64)


def by_hand(
    encoder: Encoder,
    image: Tensor,
    places: list[int],
    masked: list[int] | None = None,
    mask_token: Tensor | None = None,
    mask_after_positions: bool = False,
) -> Tensor:
    """The (P + K, dim) tokens of an image (C, SIZE, SIZE) in a ViT that is fed its prefix and K patches one by one."""
    trunk: Any = encoder.trunk
    prefix = [getattr(trunk, name, None) for name in ("cls_token", "dist_token", "reg_token")]
    first = [token for tokens in prefix if tokens is not None for token in tokens[0]]
    positions = trunk.pos_embed[0]
    unplaced = len(first) + NUM - len(positions)
    assert unplaced in (0, len(first))
    sequence = first if unplaced else [token + positions[i] for i, token in enumerate(first)]
    for place in places:
        row, column = divmod(place, GRID)
        pixels = image[:, PATCH * row : PATCH * (row + 1), PATCH * column : PATCH * (column + 1)]
        embedded = torch.stack([(weight * pixels).sum() for weight in trunk.patch_embed.proj.weight])
        if trunk.patch_embed.proj.bias is not None:
            embedded = embedded + trunk.patch_embed.proj.bias
        position = positions[len(first) - unplaced + place]
        hidden = mask_token is not None and place in (masked or [])
        if hidden and mask_after_positions:
            sequence = [*sequence, mask_token]
        else:
            sequence = [*sequence, (mask_token if hidden else embedded) + position]
    x = trunk.norm_pre(torch.stack(sequence)[None])
    for block in trunk.blocks:
        x = block(x)
    return trunk.norm(x)[0]


@every_model
@pytest.mark.parametrize("others", [(), (24,)], ids=["one size", "any size"])
def test_tokens_are_what_timm_computes(model: str, others: tuple[int, ...], generator: torch.Generator):
    encoder = make(model, *others)
    trunk: Any = encoder.trunk
    for size in (SIZE, *others):
        x = images(generator, size)
        prefix, patches = encoder.tokens(x)
        rows, columns = encoder.grid(size)
        assert (rows, columns) == (size // PATCH, size // PATCH)
        assert (prefix.shape, patches.shape) == ((3, PREFIX[model], 16), (3, rows * columns, 16))
        assert torch.equal(torch.cat([prefix, patches], 1), trunk.forward_features(x))
        assert torch.equal(trunk.forward_head(torch.cat([prefix, patches], 1)), encoder(x))
        options = {"return_prefix_tokens": True, "norm": True, "output_fmt": "NLC", "intermediates_only": True}
        (last,) = trunk.forward_intermediates(x, 1, **options)
        last_patches, last_prefix = last if isinstance(last, tuple) else (last, last[:, :0])
        torch.testing.assert_close((prefix, patches), (last_prefix, last_patches), rtol=0, atol=1e-12)


@every_model
def test_kept_patches_are_computed_as_if_there_were_no_others(model: str, generator: torch.Generator):
    encoder, x = make(model), images(generator)
    keep = torch.rand(3, NUM, generator=generator).argsort(1)[:, :5]
    prefix, patches = encoder.tokens(x, keep=keep)
    expected = torch.stack([by_hand(encoder, image, row.tolist()) for image, row in zip(x, keep, strict=True)])
    torch.testing.assert_close(torch.cat([prefix, patches], 1), expected, rtol=0, atol=1e-11)
    shifted = (keep + 1) % NUM
    wrong = torch.stack([by_hand(encoder, image, row.tolist()) for image, row in zip(x, shifted, strict=True)])
    assert (wrong - expected).abs().max() > 1e-3, "an offset by one would be found"


@every_model
@pytest.mark.parametrize("shape", [(16,), (1, 1, 16)])
def test_the_mask_token_takes_the_place_of_masked_patches_before_positions_are_added(
    model: str, shape: tuple[int, ...], generator: torch.Generator
):
    encoder, x = make(model), images(generator)
    mask = torch.rand(3, NUM, generator=generator) < 0.4
    token = torch.randn(16, generator=generator, dtype=torch.float64)
    prefix, patches = encoder.tokens(x, mask=mask, mask_token=token.view(shape))
    for planted in (False, True):
        expected = [
            by_hand(encoder, image, list(range(NUM)), row.nonzero().flatten().tolist(), token, planted)
            for image, row in zip(x, mask, strict=True)
        ]
        error = (torch.cat([prefix, patches], 1) - torch.stack(expected)).abs().max()
        assert error > 1e-3 if planted else error < 1e-11


def test_a_mask_and_a_selection_go_together_and_at_any_size(generator: torch.Generator):
    """I-JEPA's predictor and DINOv2's local crops: what is masked is masked before patches are selected."""
    encoder = make("registers", 24)
    for size in (SIZE, 24):
        rows, columns = encoder.grid(size)
        x, token = images(generator, size), torch.randn(16, generator=generator, dtype=torch.float64)
        mask = torch.rand(3, rows * columns, generator=generator) < 0.5
        whole = encoder.tokens(x, mask=mask, mask_token=token)
        every = torch.rand(3, rows * columns, generator=generator).argsort(1)
        prefix, patches = encoder.tokens(x, keep=every, mask=mask, mask_token=token)
        torch.testing.assert_close(prefix, whole.prefix, rtol=0, atol=1e-11)
        torch.testing.assert_close(patches, whole.patches.take_along_dim(every[..., None], 1), rtol=0, atol=1e-11)
        again = encoder.tokens(x, mask=~mask, mask_token=token)
        assert (again.patches - whole.patches).abs().max() > 1e-3


@every_model
def test_no_gradient_reaches_what_is_not_seen(model: str, generator: torch.Generator):
    encoder, x = make(model), images(generator).requires_grad_()
    keep = torch.rand(3, NUM, generator=generator).argsort(1)[:, :5]
    prefix, patches = encoder.tokens(x, keep=keep)
    (prefix.sum() + patches.square().sum()).backward()
    assert x.grad is not None
    blocks = x.grad.abs().unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).sum((1, 4, 5)).flatten(1)
    assert torch.equal(blocks > 0, torch.zeros(3, NUM, dtype=torch.bool).scatter(1, keep, True))


def test_in_autocast_a_mask_token_does_not_widen_the_tokens(generator: torch.Generator):
    encoder = make("registers").float()
    x, mask = images(generator).float(), torch.rand(3, NUM, generator=generator) < 0.4
    token = torch.zeros(1, 1, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        dtypes = {tokens.dtype for tokens in (*encoder.tokens(x), *encoder.tokens(x, mask=mask, mask_token=token))}
    assert len(dtypes) == 1
    encoder.tokens(x, mask=mask, mask_token=token).patches.square().sum().backward()
    assert token.grad is not None
    assert token.grad.abs().max() > 0


@pytest.mark.slow
def test_tokens_compile_as_one_graph_and_wait_for_no_device(generator: torch.Generator, no_host_sync: Any):
    encoder = make("registers", 24)
    token = torch.zeros(16, dtype=torch.float64)

    def tokens(x: Tensor, keep: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        return *encoder.tokens(x, keep=keep), *encoder.tokens(x, mask=mask, mask_token=token)

    compiled: Callable[..., Any] = torch.compile(tokens, fullgraph=True, backend="eager")
    x = images(generator)
    order = torch.rand(3, NUM, generator=generator).argsort(1)
    with no_host_sync:
        plain = tokens(x, order[:, :5], order < 3)
    torch.testing.assert_close(compiled(x, order[:, :5], order < 3), plain, rtol=0, atol=1e-12)


@every_model
def test_what_pools_and_the_patch_projection_are_frozen_by_name(model: str, generator: torch.Generator):
    encoder, x = make(model), images(generator)
    encoder.freeze_pooling()
    encoder.freeze_patch_projection()
    frozen = {name for name, parameter in encoder.named_parameters() if not parameter.requires_grad}
    torch.cat(encoder.tokens(x), 1).square().sum().backward()
    without = {name for name, parameter in encoder.named_parameters() if parameter.grad is None}
    assert without == frozen
    assert {name.split(".")[1] for name in frozen} <= {"patch_embed", "fc_norm", "attn_pool"}
    assert any(name.startswith("trunk.patch_embed.proj.") for name in frozen)
    assert encoder.has_last_norm == any(name.startswith("trunk.norm.") for name, _ in encoder.named_parameters())


def test_kind_and_patch_say_what_an_encoder_is():
    vit = make("no class token")
    assert (vit.kind, vit.patch, vit.grid(SIZE)) == ("vit", PATCH, (GRID, GRID))
    resnet = build(RESNET, SIZE)
    assert (resnet.kind, resnet.patch, resnet.has_last_norm) == ("conv", None, False)
    hybrid = build(Config(name="vit_tiny_r_s16_p8_224"), 64)
    assert hybrid.kind == "vit"
    assert math.prod(hybrid.grid(64)) == hybrid.tokens(torch.zeros(1, 3, 64, 64)).patches.shape[1]


def test_an_encoder_without_tokens_says_so_in_one_line():
    resnet = build(RESNET, SIZE)
    asks = [lambda: resnet.tokens(torch.zeros(1, 3, SIZE, SIZE)), lambda: resnet.grid(SIZE)]
    for ask in (*asks, resnet.freeze_pooling, resnet.freeze_patch_projection):
        with pytest.raises(ConfigError, match=r"^[^\n]* needs a ViT, not ResNet: use --encoder.name vit_[^\n]*$"):
            ask()


TOKEN = torch.zeros(16)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keep": torch.zeros(2, 4).long()}, "keep to be int64 of shape (3, K), got torch.int64 of shape (2, 4)"),
        ({"keep": torch.zeros(3, 4).int()}, "keep to be int64 of shape (3, K), got torch.int32 of shape (3, 4)"),
        ({"mask": torch.zeros(3, 9).bool(), "mask_token": TOKEN}, "shape (3, 16), got torch.bool"),
        ({"mask": torch.zeros(3, NUM), "mask_token": TOKEN}, "mask to be bool of shape (3, 16), got torch.float32"),
        ({"mask": torch.zeros(3, NUM).bool()}, "both mask and mask_token or neither"),
        ({"mask_token": TOKEN}, "both mask and mask_token or neither"),
    ],
)
def test_a_selection_that_does_not_fit_is_one_line(options: dict[str, Tensor], words: str, generator: torch.Generator):
    with raises_one_line(ValueError, "expected ", words):
        make("class token").tokens(images(generator), **options)

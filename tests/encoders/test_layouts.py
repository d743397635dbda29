"""Every layout: a model of its library, saved the library's way, is identified and loaded, and computes the same.

No weights are downloaded: each model is built from a small config, and all of its numbers are random.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn

import sslx
from kit.errors import raises_one_line
from kit.random_models import randomized
from sslx.encoders import rebuild, weights
from sslx.encoders.weights import describe, identify
from sslx.errors import DataError

Features = Callable[[Any, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """layout: the file that reads it.  build: the owner's model.  owner, trunk: what is compared.

    pool: the owner's features of whole images, of what ``owner`` gives.
    """

    layout: str
    build: Callable[[], nn.Module]
    owner: Features
    trunk: Features = lambda trunk, x: trunk.forward_features(x)
    left: str = ""
    pool: Callable[[Tensor], Tensor] = lambda found: found if found.ndim == 2 else found[:, 0]


def hugging_face(module: str, name: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    """Classes directly from their modules: the package's own index of all models takes seconds to import."""

    def build() -> nn.Module:
        folder, _, file = module.rpartition(".")
        models = import_module(f"transformers.models.{folder or module}.modeling_{file}")
        configs = import_module(f"transformers.models.{folder or module}.configuration_{file}")
        return getattr(models, name)(getattr(configs, config)(**options))

    return build


def tokens(model: Any, x: Tensor) -> Tensor:
    return model(x).last_hidden_state


def pooled(model: Any, x: Tensor) -> Tensor:
    return model(x).pooler_output.flatten(1)


def features(model: Any, x: Tensor) -> Tensor:
    return model(x)


def flat_features(model: Any, x: Tensor) -> Tensor:
    return model(x).flatten(1)


def mae_tokens(model: Any, x: Tensor) -> Tensor:
    """Of all patches: with a mask ratio of 0, only their order is random, and the noise here is in order."""
    noise = torch.arange(16.0).expand(len(x), -1)
    model.config.mask_ratio = 0.0
    return model.vit(x, noise=noise).last_hidden_state


def mean_of_patches(found: Tensor) -> Tensor:
    return found.mean(1)


def torchvision_vit(model: Any, x: Tensor) -> Tensor:
    x = model._process_input(x)
    return model.encoder(torch.cat([model.class_token.expand(len(x), -1, -1), x], 1))


def without(name: str) -> Features:
    """The features of a torchvision model: its last module replaced."""

    def compute(model: Any, x: Tensor) -> Tensor:
        setattr(model, name, nn.Identity())
        return model(x)

    return compute


def torchvision_convnext_features(model: Any, x: Tensor) -> Tensor:
    model.classifier[2] = nn.Identity()
    return model(x)


def clip_vit(model: Any, x: Tensor) -> Tensor:
    model.proj = None
    return model(x)


def clip_resnet(model: Any, x: Tensor) -> Tensor:
    """Pooled by attention, before the projection to the space of texts."""
    width = model.attnpool.q_proj.out_features
    model.attnpool.c_proj.weight.copy_(torch.eye(width))
    model.attnpool.c_proj.bias.zero_()
    return model(x)


def torchvision_convnext() -> nn.Module:
    block = torchvision.models.convnext.CNBlockConfig
    return torchvision.models.ConvNeXt([block(8, 16, 1), block(16, 24, 2), block(24, 32, 1), block(32, None, 1)])


def torchvision_resnet() -> nn.Module:
    return torchvision.models.resnet.ResNet(torchvision.models.resnet.BasicBlock, [1, 2, 1, 1])


def torchvision_swin(second: bool = False) -> nn.Module:
    from torchvision.models import swin_transformer as swin

    options = {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2} if second else {}
    return swin.SwinTransformer([2, 2], 16, [2, 1], [1, 2], [4, 4], **options)


def sequential(model: nn.Module) -> nn.Module:
    return nn.Sequential(*list(model.children())[:-1])


def lightly_resnet() -> nn.Module:
    from lightly.models import ResNetGenerator

    return ResNetGenerator("resnet-18", width=0.25)


VIT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1, "image_size": 32, "patch_size": 8}
MLP = {"intermediate_size": 128, "layer_norm_eps": 1e-6}
STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 2, 1, 1]}
SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 1], "num_heads": [1, 2], "window_size": 4}
DECODER = {
    "decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 64,
}  # fmt: skip
CASES = {
    "ViT": Case("huggingface_vit", hugging_face("vit", "ViTModel", "ViTConfig", **VIT, **MLP), tokens, left="pooler"),
    "ViTMAE": Case(
        "huggingface_vit",
        hugging_face("vit_mae", "ViTMAEForPreTraining", "ViTMAEConfig", **VIT, **MLP, **DECODER),
        mae_tokens,
    ),
    "I-JEPA": Case(
        "huggingface_vit",
        hugging_face("ijepa", "IJepaModel", "IJepaConfig", **VIT, **MLP),
        tokens,
        pool=mean_of_patches,
    ),
    "BEiT": Case(
        "huggingface_beit",
        hugging_face("beit", "BeitModel", "BeitConfig", use_relative_position_bias=True, **VIT, **MLP),
        pooled,
        features,
    ),
    "BEiT with shared positions": Case(
        "huggingface_beit",
        hugging_face("beit", "BeitModel", "BeitConfig", use_shared_relative_position_bias=True, **VIT, **MLP),
        pooled,
        features,
    ),
    "data2vec": Case(
        "huggingface_beit",
        lambda: data2vec(),
        pooled,
        features,
    ),
    "DINOv2": Case("huggingface_dinov2", hugging_face("dinov2", "Dinov2Model", "Dinov2Config", **VIT), tokens),
    "DINOv2, SwiGLU": Case(
        "huggingface_dinov2",
        hugging_face("dinov2", "Dinov2Model", "Dinov2Config", use_swiglu_ffn=True, **VIT),
        tokens,
    ),
    "DINOv2 with registers": Case(
        "huggingface_dinov2",
        hugging_face("dinov2_with_registers", "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", **VIT),
        tokens,
    ),
    "DINOv3": Case(
        "huggingface_dinov3",
        hugging_face("dinov3_vit", "DINOv3ViTModel", "DINOv3ViTConfig", num_register_tokens=4, intermediate_size=256,
                     **VIT),
        tokens,
        pool=lambda found: found[:, 5:].mean(1),
    ),
    "ConvNeXt": Case(
        "huggingface_convnext", hugging_face("convnext", "ConvNextModel", "ConvNextConfig", **STAGES), pooled, features
    ),
    "ConvNeXt V2": Case(
        "huggingface_convnext",
        hugging_face("convnextv2", "ConvNextV2Model", "ConvNextV2Config", **STAGES),
        pooled,
        features,
    ),
    "ResNet": Case(
        "huggingface_resnet",
        hugging_face("resnet", "ResNetModel", "ResNetConfig", embedding_size=64, hidden_sizes=[32, 32, 64, 64],
                     depths=[1, 2, 1, 1]),
        pooled,
        features,
    ),
    "Swin": Case("huggingface_swin", hugging_face("swin", "SwinModel", "SwinConfig", **SWIN), pooled, features),
    "Swin V2": Case(
        "huggingface_swin", hugging_face("swinv2", "Swinv2Model", "Swinv2Config", **SWIN), pooled, features
    ),
    "torchvision ViT": Case(
        "torchvision_vit", lambda: torchvision.models.VisionTransformer(32, 8, 2, 1, 64, 256), torchvision_vit
    ),
    "torchvision Swin": Case("torchvision_swin", torchvision_swin, without("head"), features),
    "torchvision Swin V2": Case("torchvision_swin", lambda: torchvision_swin(True), without("head"), features),
    "torchvision ConvNeXt": Case("torchvision_convnext", torchvision_convnext, torchvision_convnext_features, features),
    "torchvision ResNet": Case("timm", torchvision_resnet, without("fc"), features),
    "open_clip ViT": Case(
        "open_clip_vit",
        lambda: import_module("open_clip.transformer").VisionTransformer(32, 8, 64, 2, 1, 4.0, output_dim=32),
        clip_vit,
        features,
    ),
    "open_clip ResNet": Case(
        "open_clip_resnet",
        lambda: import_module("open_clip.modified_resnet").ModifiedResNet([3, 4, 6, 3], 256, 4, 64, 8),
        clip_resnet,
        features,
    ),
    "lightly, torchvision's ResNet": Case(
        "sequential_resnet", lambda: sequential(torchvision_resnet()), flat_features, features
    ),
    "lightly's own ResNet": Case(
        "lightly_resnet", lightly_resnet, without("linear"), features
    ),
}  # fmt: skip


def data2vec() -> nn.Module:
    models = import_module("transformers.models.data2vec.modeling_data2vec_vision")
    config = import_module("transformers.models.data2vec.configuration_data2vec_vision").Data2VecVisionConfig
    return models.Data2VecVisionModel(config(use_relative_position_bias=True, **VIT, **MLP), add_pooling_layer=True)


def save(model: Any, folder: Path) -> Path:
    """As the owner does: by save_pretrained, or as a state dict."""
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder)
        return folder
    torch.save(model.state_dict(), folder / "model.pt")
    return folder / "model.pt"


def photos(generator: torch.Generator) -> list[Image.Image]:
    """Wide and tall ones, of which some halves of pixels are left over around the center."""
    sides = (40, 51), (57, 40), (64, 64)
    pixels = [torch.randint(256, (*side, 3), generator=generator, dtype=torch.uint8).numpy() for side in sides]
    return [Image.fromarray(array) for array in pixels]


def write_processor(folder: Path, size: int) -> Callable[[Image.Image], Tensor]:
    """Write settings of transformers' most common image processor beside the weights; return the processor."""
    processor: Any = import_module("transformers.models.bit.image_processing_pil_bit").BitImageProcessorPil(
        size={"shortest_edge": size + 5}, crop_size={"height": size, "width": size}, image_std=[0.2, 0.25, 0.3]
    )
    processor.save_pretrained(folder)
    return lambda image: processor(image, return_tensors="pt")["pixel_values"][0]


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_the_owners_model_is_identified_loaded_and_computes_the_same(
    name: str, tmp_path: Path, generator: torch.Generator
):
    case = CASES[name]
    owner = randomized(case.build(), generator)
    path = save(owner, tmp_path)
    checkpoint = tmp_path / "epoch=1.ckpt"  # as Lightning saves a model of which the encoder is a part
    part = {f"model.backbone.{key}": value for key, value in owner.state_dict().items()}
    torch.save({"epoch": 1, "state_dict": part}, checkpoint)
    (found,) = identify.identified(str(path))
    assert (found.layout, found.misfit) == (case.layout, "")
    encoder = rebuild(found.recipe).eval()
    line = weights.load(encoder.trunk, str(path), found.recipe.name)
    num = len(encoder.trunk.state_dict())
    assert f"{num} of {num} tensors" in line
    assert case.left in line
    size = min(found.recipe.size, 64)
    x = torch.randn(2, 3, size, size, generator=generator)
    expected = case.owner(owner, x)
    computed = case.trunk(encoder.trunk, x)
    assert computed.shape == expected.shape
    assert (computed - expected).abs().max() < 1e-5 * expected.abs().max()
    again = rebuild(found.recipe)
    assert "under state_dict.model.backbone" in weights.load(again.trunk, str(checkpoint), found.recipe.name)
    values = again.trunk.state_dict()
    assert all(torch.equal(value, values[key]) for key, value in encoder.trunk.state_dict().items())
    prepare = write_processor(tmp_path, size)
    trained, images = sslx.load(path), photos(generator)
    expected = case.pool(case.owner(owner, torch.stack([prepare(image) for image in images])))
    vectors = trained.embed(images, threads=1)
    assert (vectors - expected).abs().max() < 1e-5 * expected.abs().max(), trained.notes
    assert f"{num} of {num} tensors" in trained.notes[0]
    assert trained.notes[1] == f"preprocessing: {size} px, as preprocessor_config.json says"


def of_other_shapes(kind: str, generator: torch.Generator) -> Tensor:
    shapes = {
        "numbers": (),
        "vectors": (3,),
        "nothing": (0,),
        "five dimensions": (1, 2, 1, 2, 1),
    }
    return torch.randn(shapes[kind], generator=generator)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["numbers", "vectors", "nothing", "five dimensions"])
def test_a_file_with_a_layouts_names_and_other_shapes_is_one_line(
    kind: str, tmp_path: Path, generator: torch.Generator
):
    """For all layouts at once: a table with every library's names under a prefix of its own."""
    tables = {
        str(number): {key: of_other_shapes(kind, generator) for key in case.build().state_dict()}
        for number, case in enumerate(CASES.values())
    }
    torch.save(tables, tmp_path / "file.pt")
    for name in (
        "vit_tiny_patch16_224",
        "swinv2_tiny_window8_256",
        "resnet18",
        "convnext_atto",
        "beit_base_patch16_224",
    ):
        trunk = timm.create_model(name, num_classes=0)
        with raises_one_line(DataError, "does not fit"):
            weights.load(trunk, str(tmp_path / "file.pt"), name)
    found = identify.identified(str(tmp_path / "file.pt"))
    assert all(one.misfit for one in found)
    assert all("\n" not in line for line in describe.lines(str(tmp_path / "file.pt")))

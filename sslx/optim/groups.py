"""Parameter groups: which weights decay, which ones LARS adapts, and how fast each layer of the encoder learns."""

import re
from typing import Any

from torch import nn

from sslx.errors import ConfigError

Groups = list[dict[str, Any]]


def split(module: nn.Module, trunk: nn.Module | None = None, layer_decay: float = 1.0) -> Groups:
    """The module's trainable parameters in groups, each with the settings that it does not share with the others.

    trunk: the part of the module whose layers ``layer_decay`` slows down; None is allowed where that is 1.
    A group has ``lr_scale``, the factor of its learning rate (see ``lr_scales``; 1 outside the trunk), and ``decayed``
    and ``adapt``, which are true for tensors of two axes or more.  All others (biases, norms, temperatures) have
    ``weight_decay=0`` as well: decay and LARS would pull them toward 0 for nothing (arXiv 1708.03888, SimCLR's code).
    """
    scales: dict[int, float] = {}
    if layer_decay != 1.0:
        assert trunk is not None, "layer_decay needs to know the trunk"
        by_name = lr_scales(trunk, layer_decay)
        scales = {id(parameter): by_name[name] for name, parameter in trunk.named_parameters()}
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups: Groups = []
    for scale in dict.fromkeys(scales.get(id(parameter), 1.0) for parameter in trainable):
        alike = [parameter for parameter in trainable if scales.get(id(parameter), 1.0) == scale]
        weights = [parameter for parameter in alike if parameter.ndim > 1]
        others = [parameter for parameter in alike if parameter.ndim <= 1]
        groups.append({"params": weights, "lr_scale": scale, "decayed": True, "adapt": True})
        groups.append({"params": others, "lr_scale": scale, "decayed": False, "adapt": False, "weight_decay": 0.0})
    return [group for group in groups if group["params"]]


def lr_scales(trunk: nn.Module, layer_decay: float) -> dict[str, float]:
    """The factor of the learning rate of each of the trunk's parameters, by name.

    Layer l of a trunk with ``depth`` blocks has layer_decay ** (depth + 1 - l), as in BEiT (arXiv 2106.08254) and MAE
    (arXiv 2111.06377, table 9): the heads, outside the trunk, and what follows the last block have 1, the
    last block has layer_decay, and the embeddings have the smallest factor.
    """
    layers, depth = layers_of(trunk)
    return {name: layer_decay ** (depth + 1 - layer) for name, layer in layers.items()}


def layers_of(trunk: nn.Module) -> tuple[dict[str, int], int]:
    """(the layer of each of the trunk's parameters, by name, the number of blocks).

    Layer 0 is what comes before the first block: a ViT's embeddings and tokens, a convolutional network's stem.  The
    blocks are layers 1, 2, ...: a ViT's blocks, a ResNet's stages.  What comes after the last block, a ViT's final
    norm, is one layer more.  Blocks are those of timm's ``group_matcher``.  Its other patterns are not used: those of
    timm 1.0.20 count register tokens among the last layer, and the final norm is a layer of its own there.
    ConfigError where timm does not say what the blocks of the trunk are.
    """
    matcher = getattr(trunk, "group_matcher", None)
    patterns = matcher(coarse=True) if matcher is not None else None
    entries = patterns.get("blocks", []) if isinstance(patterns, dict) else []
    regexes: list[str] = [entries] if isinstance(entries, str) else [entry[0] for entry in entries]
    numbered = [regex for regex in map(re.compile, regexes) if regex.groups]
    names = [name for name, _ in trunk.named_parameters()]
    blocks: list[str | None] = []
    for name in names:
        matches = (regex.match(name) for regex in numbered)
        blocks.append(next((match.group() for match in matches if match), None))
    order = [block for block in dict.fromkeys(blocks) if block is not None]
    if not order:
        raise ConfigError(
            f"--optim.layer-decay needs an encoder whose blocks timm knows, such as a ViT or a ResNet, and got "
            f"{type(trunk).__name__}: take --optim.layer-decay 1"
        )
    last = max(number for number, block in enumerate(blocks) if block is not None)
    layers: dict[str, int] = {}
    layer = 0
    for number, (name, block) in enumerate(zip(names, blocks, strict=True)):
        if block is not None:
            layer = 1 + order.index(block)
        elif number > last:
            layer = len(order) + 1
        layers[name] = layer
    return layers, len(order)

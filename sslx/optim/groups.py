"""Parameter groups, which decide on weight decay, LARS's adaptation and the learning rate of each encoder layer."""

import re
from typing import Any

from torch import nn

from sslx.errors import ConfigError

Groups = list[dict[str, Any]]


def split(module: nn.Module, trunk: nn.Module | None = None, layer_decay: float = 1.0) -> Groups:
    """Split the module's trainable parameters into optimizer groups.

    trunk: the part of the module whose layers ``layer_decay`` slows down.  It may be None if ``layer_decay`` is 1.
    Each group has ``lr_scale``, the factor on its learning rate (see ``lr_scales``; 1 outside the trunk), and
    ``decayed`` and ``adapt``, which are True for tensors with two or more axes.  All others (biases, norms,
    temperatures) also have ``weight_decay=0``, because decay and LARS would pull them toward 0 for no benefit
    (arXiv 1708.03888, SimCLR's code).
    """
    scales: dict[int, float] = {}
    if layer_decay != 1.0:
        assert trunk is not None, "layer_decay needs to know the trunk"
        by_name = lr_scales(trunk, layer_decay)
        scales = {id(parameter): by_name[name] for name, parameter in trunk.named_parameters()}
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups: Groups = []
    for scale in dict.fromkeys(scales.get(id(parameter), 1.0) for parameter in trainable):
        scaled = [parameter for parameter in trainable if scales.get(id(parameter), 1.0) == scale]
        weights = [parameter for parameter in scaled if parameter.ndim > 1]
        vectors = [parameter for parameter in scaled if parameter.ndim <= 1]
        groups.append({"params": weights, "lr_scale": scale, "decayed": True, "adapt": True})
        groups.append({"params": vectors, "lr_scale": scale, "decayed": False, "adapt": False, "weight_decay": 0.0})
    return [group for group in groups if group["params"]]


def lr_scales(trunk: nn.Module, layer_decay: float) -> dict[str, float]:
    """Return the factor on the learning rate of each of the trunk's parameters, by name.

    The factor of layer l in a trunk with ``depth`` blocks is layer_decay ** (depth + 1 - l), as in BEiT
    (arXiv 2106.08254) and MAE (arXiv 2111.06377, table 9).  It is 1 for layers after the last block (and for the heads,
    outside the trunk), layer_decay for the last block, and smallest for the embeddings.
    """
    layers, depth = layers_of(trunk)
    return {name: layer_decay ** (depth + 1 - layer) for name, layer in layers.items()}


def layers_of(trunk: nn.Module) -> tuple[dict[str, int], int]:
    """Return the layer of each of the trunk's parameters, by name, and the number of blocks.

    Layer 0 is everything before the first block: a ViT's embeddings and tokens, or a convolutional network's stem.
    Layers 1, 2, ... are the blocks: a ViT's blocks or a ResNet's stages.  Everything after the last block, such as a
    ViT's final norm, is one more layer.  The blocks come from timm's ``group_matcher``.  Its other patterns are not
    used, because those of timm 1.0.20 put register tokens into the last layer and give the final norm a separate layer.
    Raises ConfigError if timm does not define blocks for the trunk.
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
            f"--optim.layer-decay needs an encoder for which timm defines blocks, such as a ViT or a ResNet, got "
            f"{type(trunk).__name__}: use --optim.layer-decay 1"
        )
    last = max(i for i, block in enumerate(blocks) if block is not None)
    layers: dict[str, int] = {}
    layer = 0
    for i, (name, block) in enumerate(zip(names, blocks, strict=True)):
        if block is not None:
            layer = 1 + order.index(block)
        elif i > last:
            layer = len(order) + 1
        layers[name] = layer
    return layers, len(order)

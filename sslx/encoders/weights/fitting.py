"""Fits tensors under timm's names to an encoder of other sizes, as timm does for its own weights, and says what it did.

Position embeddings of another grid are interpolated, the first convolution is adapted to the number of channels of the
images, projections are split, and dimensions of length 1 are added or removed.
"""

import math
from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn

from sslx.encoders.weights.layouts.base import Converted

_SPLIT = ("q_proj", "k_proj", "v_proj")


def fitted(tensors: Mapping[str, Converted], trunk: nn.Module, own: Mapping[str, Tensor]) -> dict[str, Converted]:
    """Return the tensors with the shapes of the encoder's, as far as that is possible without other features.

    own: the encoder's tensors by name.
    """
    tensors = _split_projections(tensors, own)
    return {
        name: _fitted(name, tensor, trunk, own[name])
        if name in own and own[name].shape != tensor.value.shape
        else tensor
        for name, tensor in tensors.items()
    }


def _fitted(name: str, tensor: Converted, trunk: nn.Module, own: Tensor) -> Converted:
    """Return a tensor of another shape with the encoder's shape, or unchanged."""
    value, model = tensor.value, cast(Any, trunk)  # timm's models are not typed
    if value.ndim != own.ndim and _without_ones(value) == _without_ones(own):
        return Converted(value.reshape(own.shape), tensor.sources, (*tensor.changes, "reshaped"))
    if not value.is_floating_point():
        return tensor
    if name == "pos_embed" and value.ndim == own.ndim == 3 and value.shape[2] == own.shape[2]:
        return _resized_positions(tensor, model, own)
    if name.endswith("relative_position_bias_table") and value.ndim == own.ndim == 2:
        return _resized_relative_positions(name, tensor, model, own)
    if name in _first_convolutions(model) and value.ndim == own.ndim == 4:
        num_channels = own.shape[1]
        if value.shape[0] == own.shape[0] and value.shape[2:] == own.shape[2:] and value.shape[1] == 3:
            from timm.models import adapt_input_conv  # inside functions: see encoders.build

            change = f"adapted from 3 to {num_channels} input channels"
            return Converted(adapt_input_conv(num_channels, value), tensor.sources, (*tensor.changes, change))
    return tensor


def _without_ones(value: Tensor) -> list[int]:
    return [length for length in value.shape if length != 1]


def _first_convolutions(model: Any) -> tuple[str, ...]:
    names = getattr(model, "pretrained_cfg", {}).get("first_conv") or ()
    return tuple(f"{name}.weight" for name in ((names,) if isinstance(names, str) else names))


def _resized_positions(tensor: Converted, model: Any, own: Tensor) -> Converted:
    """Interpolate position embeddings (1, P + N, dim) of a square grid of N patches, after P prefix tokens."""
    from timm.layers.pos_embed import resample_abs_pos_embed

    new: tuple[int, int] = tuple(model.patch_embed.grid_size)
    num_prefix = own.shape[1] - new[0] * new[1]
    side = math.isqrt(max(0, tensor.value.shape[1] - num_prefix))
    if num_prefix < 0 or side == 0 or side * side != tensor.value.shape[1] - num_prefix:
        return tensor
    value = resample_abs_pos_embed(tensor.value, list(new), [side, side], num_prefix)
    change = f"interpolated from {side} x {side} to {new[0]} x {new[1]} patches"
    return Converted(value, tensor.sources, (*tensor.changes, change))


def _resized_relative_positions(name: str, tensor: Converted, model: Any, own: Tensor) -> Converted:
    """Interpolate the table of relative positions, (positions, heads), of another window or grid."""
    from timm.layers.pos_embed_rel import resize_rel_pos_bias_table

    attention = model.get_submodule(name.rpartition(".")[0])
    old = math.isqrt(tensor.value.shape[0])
    num_extra = own.shape[0] - (2 * attention.window_size[0] - 1) * (2 * attention.window_size[1] - 1)
    side = math.isqrt(max(0, tensor.value.shape[0] - num_extra))
    if tensor.value.shape[1] != own.shape[1] or side * side != tensor.value.shape[0] - num_extra or not old:
        return tensor
    value = resize_rel_pos_bias_table(tensor.value, attention.window_size, tuple(own.shape))
    window = " x ".join(map(str, attention.window_size))
    old = (side + 1) // 2
    change = f"interpolated from {old} x {old} to {window} patches"
    return Converted(value, tensor.sources, (*tensor.changes, change))


def _split_projections(tensors: Mapping[str, Converted], own: Mapping[str, Tensor]) -> dict[str, Converted]:
    """Split the joined projection of queries, keys and values where the encoder has one for each."""
    split: dict[str, Converted] = {}
    for name, tensor in tensors.items():
        names = [name.replace(".qkv.", f".{projection}.") for projection in _SPLIT]
        of_bias = name.replace(".q_bias", ".q_proj.bias").replace(".v_bias", ".v_proj.bias")
        if name not in own and of_bias in own:
            split[of_bias] = tensor
        elif name not in own and names[0] in own and names[0] != name and tensor.value.shape[0] % 3 == 0:
            for part, value in zip(names, tensor.value.chunk(3), strict=True):
                split[part] = Converted(value, tensor.sources, (*tensor.changes, "split"))
        else:
            split[name] = tensor
    return split

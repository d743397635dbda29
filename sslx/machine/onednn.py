"""Workarounds for two bugs of oneDNN on CPUs.

uxlfoundation/oneDNN#6035: for a convolution with kernel size 1, a stride of at least 2 and fewer input channels than a
vector holds (8 with AVX2, 16 with AVX-512), in fp32 and channels_last, the weight gradient is computed by ``jit_1x1``.
It gathers pixels into a buffer of whole vectors and writes beyond the buffer's end.  The process dies of a damaged
heap: at once, later, or never.  Seen with torch 2.11 to 2.14 (oneDNN 3.10 to 3.12), AVX2 and AVX-512, one thread and
two, from about 48 px on; not with other kernel sizes, groups, precisions, a contiguous layout or SSE 4.1.

For a strided convolution in bf16 with AVX-512 or AMX, the weight gradient is left uninitialized at every tap of the
kernel that never meets a pixel of the image, such as 8 of 9 taps of a 3x3 kernel with stride 2 on a one-pixel image
(jigsaw's small tiles, tiny crops).  It should be zero there.  Seen with torch 2.14 (oneDNN 3.12); not in fp32, with
AVX2, or at stride 1.  No upstream report is known.

tests/machine/test_onednn.py says when the bugs are gone.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from sslx.console.words import plural

MAX_CHANNELS = 15
"""Largest number of input channels that is affected."""


class SlicedConv2d(nn.Conv2d):
    """A convolution with kernel size 1 that, on a CPU, strides by slicing its input.  The sums are the same."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not input.is_cpu:
            return super()._conv_forward(input, weight, bias)
        assert not isinstance(self.padding, str) or self.padding == "valid", "torch allows 'same' only with stride 1"
        if not isinstance(self.padding, str) and any(self.padding):
            (down, across), mode = self.padding, "constant" if self.padding_mode == "zeros" else self.padding_mode
            input = functional.pad(input, (across, across, down, down), mode)
        return functional.conv2d(input[:, :, :: self.stride[0], :: self.stride[1]], weight, bias)


class FP32Conv2d(nn.Conv2d):
    """A convolution that a CPU computes in fp32 instead of bf16 if a tap of its kernel meets no pixel."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        low = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else input.dtype
        if not input.is_cpu or low != torch.bfloat16 or not self._any_side_misses_a_tap(input):
            return super()._conv_forward(input, weight, bias)
        with torch.autocast("cpu", enabled=False):
            full = super()._conv_forward(input.float(), weight.float(), None if bias is None else bias.float())
        return full.to(low)

    def _any_side_misses_a_tap(self, input: Tensor) -> bool:
        if isinstance(self.padding, str):
            return False  # "valid" does not pad, and "same" requires stride 1
        sides = zip(input.shape[2:], self.kernel_size, self.stride, self.padding, self.dilation, strict=True)
        return any(_misses_a_tap(*side) for side in sides)


def _misses_a_tap(size: int, kernel: int, stride: int, padding: int, dilation: int) -> bool:
    """Return whether, along one side, a tap of the kernel lies on padding at every output position."""
    starts = range(-padding, size + padding - dilation * (kernel - 1), stride)
    return not all(any(0 <= start + tap * dilation < size for start in starts) for tap in range(kernel))


def apply_workarounds(module: nn.Module) -> None:
    """Make the affected convolutions of a module compute differently.  Parameters keep their names."""
    for layer in module.modules():
        # Layers with their own forward are left alone: timm has some, but no narrow ones with a stride.
        if isinstance(layer, nn.Conv2d) and type(layer).forward is nn.Conv2d.forward:
            if _is_affected(layer):
                layer.__class__ = SlicedConv2d
            elif max(layer.kernel_size) > 1 and max(layer.stride) > 1 and layer.padding_mode == "zeros":
                layer.__class__ = FP32Conv2d


def remove_workarounds(module: nn.Module) -> None:
    """Make all convolutions of a module torch's own again, for other runtimes than torch."""
    for layer in module.modules():
        if type(layer) in (SlicedConv2d, FP32Conv2d):
            layer.__class__ = nn.Conv2d


def describe_workarounds(module: nn.Module) -> list[str]:
    """Return a line on the convolutions that ``apply_workarounds`` sliced, or none if there are none."""
    num_sliced = sum(isinstance(layer, SlicedConv2d) for layer in module.modules())
    if num_sliced == 0:
        return []
    verb = "computes its stride" if num_sliced == 1 else "compute their stride"
    layers = plural(num_sliced, "narrow convolution")
    return [f"{layers} {verb} without oneDNN on this CPU, because oneDNN would corrupt memory (oneDNN#6035)"]


def _is_affected(layer: nn.Conv2d) -> bool:
    is_strided = layer.kernel_size == (1, 1) and max(layer.stride) > 1 and layer.groups == 1
    return is_strided and layer.in_channels <= MAX_CHANNELS

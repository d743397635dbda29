"""Two bugs of oneDNN on CPUs, and the layers that are kept away from them.

uxlfoundation/oneDNN#6035: the weight gradient of a convolution of one pixel that skips pixels (kernel 1, stride 2 and
more) and has fewer channels than a vector holds (8 with AVX2, 16 with AVX-512), in fp32 and channels_last, is computed
by ``jit_1x1``, which gathers pixels into a buffer of whole vectors and writes beyond its end.  The process dies of a
damaged heap, at once, later or not at all.  Seen with torch 2.11 to 2.14 (oneDNN 3.10 to 3.12), AVX2 and AVX-512, one
thread and two, from about 48 px on; not with other kernels, groups, precisions, a contiguous layout or SSE 4.1.

The weight gradient of a convolution that skips pixels, in bf16 with AVX-512 or AMX, is left unwritten at every tap of
the kernel that meets no pixel of the image at all, as 8 of 9 taps of a 3x3 kernel of stride 2 do on an image of one
pixel (jigsaw's small tiles, tiny crops).  It should be zero there, and is what lay in the memory.  Seen with torch 2.14
(oneDNN 3.12); not in fp32, not with AVX2, not at a stride of 1.  No report of others was found.
tests/machine/test_onednn.py tells when they are gone.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

MAX_CHANNELS = 15
"""Inputs of at most so many channels are affected."""


class Sliced(nn.Conv2d):
    """A convolution of one pixel, whose stride is taken by slicing its input on a CPU: the same sums."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not input.is_cpu:
            return super()._conv_forward(input, weight, bias)
        assert not isinstance(self.padding, str) or self.padding == "valid", "torch pads 'same' with a stride of 1 only"
        if not isinstance(self.padding, str) and any(self.padding):
            (down, across), mode = self.padding, "constant" if self.padding_mode == "zeros" else self.padding_mode
            input = functional.pad(input, (across, across, down, down), mode)
        return functional.conv2d(input[:, :, :: self.stride[0], :: self.stride[1]], weight, bias)


class Covered(nn.Conv2d):
    """A convolution that a CPU computes in fp32, in place of bf16, where a tap of its kernel meets no pixel."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        low = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else input.dtype
        if not input.is_cpu or low != torch.bfloat16 or not self._misses_a_tap(input):
            return super()._conv_forward(input, weight, bias)
        with torch.autocast("cpu", enabled=False):
            full = super()._conv_forward(input.float(), weight.float(), None if bias is None else bias.float())
        return full.to(low)

    def _misses_a_tap(self, input: Tensor) -> bool:
        if isinstance(self.padding, str):
            return False  # "valid" pads nothing, "same" goes with a stride of 1
        sides = zip(input.shape[2:], self.kernel_size, self.stride, self.padding, self.dilation, strict=True)
        return any(_misses(*side) for side in sides)


def _misses(size: int, kernel: int, stride: int, padding: int, dilation: int) -> bool:
    """Whether a tap of the kernel lies on padding only, at every place of the output."""
    places = range(-padding, size + padding - dilation * (kernel - 1), stride)
    return not all(any(0 <= place + tap * dilation < size for place in places) for tap in range(kernel))


def keep_out(module: nn.Module) -> None:
    """Have the affected convolutions of a module computed in another way; parameters keep their names."""
    for layer in module.modules():
        # Those with a forward of their own are left alone: timm has such layers, but no narrow one that skips pixels.
        if isinstance(layer, nn.Conv2d) and type(layer).forward is nn.Conv2d.forward:
            if _affected(layer):
                layer.__class__ = Sliced
            elif max(layer.kernel_size) > 1 and max(layer.stride) > 1 and layer.padding_mode == "zeros":
                layer.__class__ = Covered


def words(module: nn.Module) -> list[str]:
    """A line on what ``keep_out`` changed, none where that is nothing."""
    number = sum(isinstance(layer, Sliced) for layer in module.modules())
    which = (
        "1 narrow convolution takes its stride" if number == 1 else f"{number} narrow convolutions take their stride"
    )
    why = "without oneDNN on this CPU: its own code would damage the memory (oneDNN#6035)"
    return [f"{which} {why}"] if number else []


def _affected(layer: nn.Conv2d) -> bool:
    one_pixel = layer.kernel_size == (1, 1) and max(layer.stride) > 1 and layer.groups == 1
    return one_pixel and layer.in_channels <= MAX_CHANNELS

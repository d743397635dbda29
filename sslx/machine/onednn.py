"""A bug of oneDNN on CPUs, and the layers that are kept away from it.

uxlfoundation/oneDNN#6035: the weight gradient of a convolution of one pixel that skips pixels (kernel 1, stride 2 and
more) and has fewer channels than a vector holds (8 with AVX2, 16 with AVX-512), in fp32 and channels_last, is computed
by ``jit_1x1``, which gathers pixels into a buffer of whole vectors and writes beyond its end.  The process dies of a
damaged heap, at once, later or not at all.  Seen with torch 2.11 to 2.14 (oneDNN 3.10 to 3.12), AVX2 and AVX-512, one
thread and two, from about 48 px on; not with other kernels, groups, precisions, a contiguous layout or SSE 4.1.
tests/machine/test_onednn.py tells when it is gone.
"""

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


def keep_out(module: nn.Module) -> None:
    """Have the affected convolutions of a module take their stride by themselves; parameters keep their names."""
    for layer in module.modules():
        # Those with a forward of their own are left alone: timm has such layers, but no narrow one that skips pixels.
        if isinstance(layer, nn.Conv2d) and type(layer).forward is nn.Conv2d.forward and _affected(layer):
            layer.__class__ = Sliced


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

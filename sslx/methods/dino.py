"""DINO (Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", arXiv 2104.14294).

Two global and some local views of each image.  For every view, a student (encoder and head) learns the distribution
over prototypes that a teacher gives to each other global view.  The teacher is a moving average of the student; its
outputs are centered, so that no prototype takes all samples, and sharpened, so that it is not uniform.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sslx import distributed, losses
from sslx.data.augment import Augment
from sslx.data.batch import Batch
from sslx.data.views import ViewSpec
from sslx.encoders import Encoder
from sslx.methods import base, ema, heads
from sslx.methods.config import MultiCropConfig, SecondViewConfig


@dataclass(frozen=True, kw_only=True)
class Config(MultiCropConfig, SecondViewConfig):
    """DINO's settings; the defaults are the paper's for 100 epochs of ImageNet."""

    encoders: ClassVar = ("resnet", "vit")
    exported_name: ClassVar = "the teacher's encoder"
    name: Literal["dino"] = "dino"
    num_local: int = 8
    """Local views of each image; with 0, the two global views need a smaller augment.min_scale."""
    local_max_scale: float = 0.4
    """Largest fraction of the area for a local view; global views start at augment.min_scale, 0.4 in the code."""
    local_blur: float = 0.5
    """Probability of blur in the local views."""
    hidden_dim: int = 2048
    """Width of the head's two hidden layers."""
    bottleneck_dim: int = 256
    """Width of the head's output that is compared with prototypes."""
    output_dim: int = 65536
    """Number of prototypes (K)."""
    head_norm: bool = False
    """Batch norm in the head's hidden layers; it keeps a small ResNet from collapsing (use_bn_in_head of the code)."""
    student_temperature: float = 0.1
    """Temperature of the student's softmax (tau_s)."""
    teacher_temperature: float = 0.07
    """Temperature of the teacher's softmax (tau_t) after the warmup."""
    teacher_temperature_start: float = 0.04
    """Temperature of the teacher's softmax at first."""
    teacher_warmup: float = 0.3
    """Fraction of the training in which the teacher's temperature rises linearly; 30 of 100 epochs."""
    teacher_momentum: float = 0.996
    """Fraction of the teacher's weights that a step keeps at first; it rises to 1 along half a cosine."""
    center_momentum: float = 0.9
    """Fraction of the center that a step keeps (m of equation 4)."""
    freeze_last: float = 0.01
    """Fraction of the training in which the prototypes stay as they are; 1 of 100 epochs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("output_dim", least=2)
        self.require("student_temperature", "teacher_temperature", "teacher_temperature_start", above=0)
        self.require("local_blur", "teacher_warmup", "teacher_momentum", "center_momentum", least=0, most=1)
        self.require("freeze_last", least=0, most=1)

    def local_views(self, augment: Augment, size: int) -> "tuple[ViewSpec, ...]":
        """Return the local views, with their own probability of blur."""
        return super().local_views(replace(augment, blur=self.local_blur), size)

    def build(self, encoder: "Encoder") -> "Method":
        return Method(self, encoder)


class Head(nn.Module):
    """Three layers with GELU to a bottleneck, and its cosine with each prototype: (N, dim) -> (N, output_dim).

    The prototypes are the code's weight-normalized last layer, whose gain stays 1: weight decay shortens them, but what
    comes out depends on their directions only.

    Deviation from the code: the weights' initial standard deviation is 0.02 for 2048 inputs, as there, but larger for
    fewer, in inverse proportion to the root.  With 0.02 for 16 inputs, outputs are so short that the gradient through
    their normalization makes training unstable.
    """

    def __init__(self, dim: int, config: Config) -> None:
        super().__init__()
        dims = dim, config.hidden_dim, config.hidden_dim, config.bottleneck_dim
        self.mlp = heads.mlp(*dims, norm=config.head_norm, last_norm=False, gelu=True)
        for name, parameter in self.mlp.named_parameters():
            if parameter.ndim > 1:
                nn.init.trunc_normal_(parameter, std=0.02 * (2048 / parameter.shape[1]) ** 0.5)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        self.prototypes = nn.Linear(config.bottleneck_dim, config.output_dim, bias=False)

    def forward(self, x: Tensor, frozen: Tensor | None = None) -> Tensor:
        """Return cosines in fp32 (fp64 for fp64), in autocast too: the teacher's are divided by a small temperature.

        frozen: () bool.  If true, the prototypes get a gradient of zero; not None, for which DDP would wait.
        """
        z, weight = self.mlp(x), self.prototypes.weight
        if frozen is not None:
            weight = torch.where(frozen, weight.detach(), weight)
        with torch.autocast(z.device.type, enabled=False):
            return F.linear(F.normalize(z.to(weight.dtype), dim=1), F.normalize(weight, dim=1))


class Method(base.Method):
    """Student, teacher, center, and the cross-entropy of all pairs of different views.

    Deviations from the paper's code: no stochastic depth; gradient clipping (--optim.clip 3) and the rise of the weight
    decay (--optim.weight-decay 0.04 --optim.weight-decay-end 0.4) are off by default; the teacher's
    temperature rises with each step, not each epoch; the center starts as the first batch's mean, not as zero, which
    the code's leaves while its learning rate is still near 0.  As in the code, batch norm takes its
    statistics over all views of one size, the head's over all.  The exported encoder is the teacher's, which the
    paper evaluates.
    """

    center: Tensor

    def __init__(self, config: Config, encoder: Encoder) -> None:
        super().__init__(encoder)
        self.config = config
        self.head = Head(encoder.dim, config)
        self.teacher = ema.Average(encoder, head=self.head, base=config.teacher_momentum)
        self.register_buffer("center", torch.zeros(1, config.output_dim))

    @property
    def exported(self) -> Encoder:
        return self.teacher.encoder

    def embed(self, batch: Batch) -> base.Embedded:
        """Return the student's logits (B, output_dim) of all views; ``given`` has the teacher's of the global ones."""
        frozen = self.progress < self.config.freeze_last
        student = self.head(base.features(self.encoder, batch.views), frozen)
        with torch.no_grad():
            teacher = self.teacher(torch.cat(batch.views[:2]))
        return base.Embedded(student.chunk(len(batch.views)), teacher.chunk(2))

    def loss(self, embedded: base.Embedded) -> base.Step:
        """Return equation 3 with the mean over pairs; then update the center over all ranks (equation 4).

        ``teacher_entropy``: of the teacher's distributions, mean over samples, as a share of log K (1 means collapse
        to the uniform one).  ``prototype_entropy``: of their mean over this rank's samples (0 means collapse to one
        prototype).  ``logit_std``: spread of the student's logits of the first view.  ``teacher_temperature``: the
        step's.  ``teacher_momentum``: the value of this step's update.
        """
        student, teacher = embedded.compared, base.full_precision(torch.stack(embedded.given))
        temperature = self._temperature()
        mean = distributed.mean_over_ranks(teacher.mean((0, 1)))
        center = torch.where(self.center.any(), self.center, mean)
        self.center.copy_(center.lerp(mean, 1 - self.config.center_momentum))
        targets = torch.softmax((teacher - center) / temperature, dim=-1)
        loss = losses.self_distillation(student, targets.unbind(), self.config.student_temperature)
        metrics = {
            "teacher_entropy": losses.entropy(targets).mean(),
            "prototype_entropy": losses.entropy(targets.mean((0, 1))),
            "logit_std": losses.spread(student[0]),
            "teacher_temperature": temperature.float(),
            "teacher_momentum": self.teacher.momentum(self.progress).float(),
        }
        return base.Step(loss, metrics)

    def late_parameters(self) -> Sequence[Tensor]:
        """Return the prototypes, which are frozen at first."""
        return (self.head.prototypes.weight,)

    def after_step(self) -> None:
        """Let the teacher follow the student."""
        self.teacher.follow(self.progress)

    def _temperature(self) -> Tensor:
        config, progress = self.config, self.progress
        warm = (progress / config.teacher_warmup).clamp(max=1) if config.teacher_warmup else torch.ones_like(progress)
        rise = config.teacher_temperature - config.teacher_temperature_start
        return config.teacher_temperature_start + rise * warm

"""Build everything that a training step needs from a config: loader, method and optimizer, on this rank's device."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn
from torch.cpu import _is_amx_tile_supported, _is_avx512_bf16_supported  # pyright: ignore[reportPrivateUsage]

from sslx import data, encoders, methods, optim, parallel, rng
from sslx.config import PretrainConfig, settle
from sslx.console.words import plural
from sslx.data import Loader, sources
from sslx.data.order import Shuffled
from sslx.data.sources import Source, sides
from sslx.distributed import Ranks
from sslx.encoders import Encoder
from sslx.encoders.group_norm import has_batch_norm
from sslx.errors import ConfigError, DataError, MissingInput
from sslx.losses import toolchain
from sslx.machine import compiler, deterministic, onednn
from sslx.methods.base import Method
from sslx.monitor.online import HELD_OUT_DIVISOR, OnlineProbe
from sslx.runs import state
from sslx.train import consistency, step_memory
from sslx.train.plan import Plan


@dataclass(frozen=True)
class Parts:
    """Everything that a training step needs.

    settings: the config, with defaults chosen for these images and this machine.  plan: the values derived from it.
    model: the method, wrapped in DDP if there are several ranks.
    """

    settings: PretrainConfig
    plan: Plan
    source: Source
    loader: Loader
    method: Method
    model: nn.Module
    optimizer: torch.optim.Optimizer


def build(config: PretrainConfig, ranks: Ranks, say: Callable[[str], None], *, initial_weights: bool = True) -> Parts:
    """Build all parts, the same on every rank.

    say: prints one line on the images, the choices and the plan.  initial_weights: whether to load --encoder.weights;
    False for a run that resumes from a checkpoint, which no longer needs that file.
    Raises UserError for problems that the user can fix.
    """
    dtype, autocast = _arithmetic(config, ranks.device)
    config, source = _settled(config, ranks.world_size, say)
    plan = Plan.of(config, source, dtype, autocast, say)
    encoder = _encoder(config, plan, say, initial_weights=initial_weights)
    method = methods.build(config.method, encoder, config.average.momentum)
    _warn_of_memory(method, config, plan, ranks, say)
    method = _prepare(config, method, ranks.device, dtype)
    loader = data.training(
        config.data,
        source,
        plan.views,
        batch_size=config.batch_size,
        accumulate=config.batches_per_step,
        seed=config.seed,
        draw=method.draw,
        text=plan.text,
        ranks=ranks,
        dtype=plan.input_dtype,
        say=say,
    )
    consistency.check_parts(loader, method, plan.input_dtype)
    model = parallel.wrap(method, device=ranks.device)
    optimizer = optim.build(config.optim, method, method.encoder.trunk)
    for line in (*plan.lines(config, ranks), *_remarks(config, method, ranks.device)):
        say(line)
    return Parts(config, plan, source, loader, method, model, optimizer)


def _encoder(config: PretrainConfig, plan: Plan, say: Callable[[str], None], *, initial_weights: bool) -> Encoder:
    """Return the encoder with its initial weights; raise DataError if they are not finite."""
    trunk = config.encoder if initial_weights else replace(config.encoder, weights=None)
    rng.seed_torch(config.seed)
    channels = plan.eval_view.channels.num
    encoder = encoders.build(trunk, plan.size, *plan.view_sizes, norm=config.norm, channels=channels, say=say)
    if bad := state.not_finite(encoder.state_dict()):
        raise DataError(
            f"--encoder.weights {config.encoder.weights} contains values that are not finite in "
            f"{plural(len(bad), 'tensor')}, such as {bad[0]}: use other weights"
        )
    return encoder


def _remarks(config: PretrainConfig, method: Method, device: torch.device) -> list[str]:
    """Return what a user should know about how this method is computed on this device."""
    lines: list[str] = []
    if config.method.exported_name:
        lines.append(f"health and probes look at the features of {config.method.exported_name}")
    if config.num_grad_cache_chunks > 1 and has_batch_norm(method):
        over_ranks = " over all ranks" if config.batch_norm == "sync" else ""
        lines.append(
            f"gradient caching: batch norm takes its statistics from each of the {config.num_grad_cache_chunks} chunks"
            f"{over_ranks}, so the gradient is not quite that of the whole batch; with --batch-norm group it is exactly"
        )
    if device.type == "cpu":
        lines += onednn.describe_workarounds(method)
    return lines + compilation(config, device)


def _arithmetic(config: PretrainConfig, device: torch.device) -> tuple[torch.dtype, torch.dtype | None]:
    """Configure how this process computes; return the dtype of parameters and that of autocast, or None."""
    parameters, autocast = precision(config, device)
    check_tools(config, device)
    deterministic.configure(config.deterministic)
    # --precision fp32 means IEEE fp32.  For matrix products that is torch's default, for convolutions it is not.
    torch.backends.cudnn.allow_tf32 = autocast is not None
    return parameters, autocast


def _settled(config: PretrainConfig, world_size: int, say: Callable[[str], None]) -> tuple[PretrainConfig, Source]:
    """Return the config with defaults that suit the images, and the source of the images.

    Raises ConfigError, before an encoder is built, if the images do not fill a batch.
    """
    source = sources.build(config.source, "pretrain", config.data, say=say)
    for line in (source.describe(), *source.notes):  # before the checks, which may refuse the source
        say(line)
    config, reasons = settle(config, config.data.size or source.facts.size, source.facts.num_per_epoch)
    side = source.facts.size
    if config.source.is_own and config.data.size is None and side < sides.LARGEST:
        reasons.append(f"views of {side} px, because most images are no larger (--data.size {side})")
    for line in reasons:
        say(line)
    config.method.check(config.batch_size // config.num_micro_batches, source.facts)
    Shuffled(
        num_samples=len(source),
        batch_size=config.batch_size,
        accumulate=config.batches_per_step,
        seed=config.seed,
        world_size=world_size,
        shares=source.facts.shares,
    )
    return config, source


def _warn_of_memory(
    method: Method, config: PretrainConfig, plan: Plan, ranks: Ranks, say: Callable[[str], None]
) -> None:
    """Warn if a step may need more memory than is free."""
    num_samples = config.batch_size // ranks.world_size // config.batches_per_step
    needed_bytes = step_memory.step_bytes(method, plan.views, num_samples, config.optim.name, plan.autocast, plan.text)
    num_sharing = ranks.local_world_size if ranks.device.type == "cpu" else 1
    for line in step_memory.memory_warning(
        needed_bytes, step_memory.free_bytes(ranks.device), config.batch_size, num_sharing
    ):
        say(line)


def fast_bf16(device: torch.device) -> bool:
    """Return whether bf16 is the fastest precision on the device: on GPUs that support it, and on CPUs with AMX.

    A CPU that only has AVX-512's bf16 trains a ResNet-18 5 to 15 % slower in bf16 than in fp32.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return _is_amx_tile_supported()


def precision(config: PretrainConfig, device: torch.device) -> tuple[torch.dtype, torch.dtype | None]:
    """Return the dtype of parameters and that of autocast, or None.

    Raises ConfigError for bf16 on a CPU that has AVX-512's bf16 but no AMX: it is slower, and layers that override
    ``forward`` would have the wrong gradients that ``onednn.FP32Conv2d`` corrects in others.
    """
    choice, fast = config.precision, fast_bf16(device)
    if choice == "auto":
        choice = "bf16" if fast else "fp32"
    if choice == "bf16" and not fast and device.type == "cpu" and _is_avx512_bf16_supported():
        raise ConfigError(
            "--precision bf16 on a CPU without AMX is slower than fp32, and its gradients of small convolutions can be "
            "wrong (oneDNN): use fp32 or auto"
        )
    if choice == "bf16":
        return torch.float32, torch.bfloat16
    return torch.float64 if choice == "fp64" else torch.float32, None


def _prepare(config: PretrainConfig, method: Method, device: torch.device, dtype: torch.dtype) -> Method:
    """Move the method to its device and dtype, and compile it if the config says so."""
    method = method.to(device, dtype)
    onednn.apply_workarounds(method)
    if compiles(config, device):
        if device.type == "cpu":
            compiler.configure_for_cpu()
        else:
            compiler.configure_for_gpu()
        compiler.keep_backward_precision()
        method.compile_embed()
    return method


def lacks(device: torch.device) -> tuple[str, str]:
    """Return what torch.compile needs on the device and the machine lacks, or "", and the command that installs it."""
    if device.type == "cuda":
        return toolchain.missing(), toolchain.INSTALL
    return "" if compiler.find_cpp() else "a C++ compiler", compiler.INSTALL


def check_tools(config: PretrainConfig, device: torch.device) -> None:
    """Raise ConfigError if --compile on needs a tool that the machine lacks."""
    missing, install = lacks(device)
    if config.compile == "on" and missing:
        raise ConfigError(f"--compile on needs {missing}: {install}, or use --compile off")


def compiles(config: PretrainConfig, device: torch.device) -> bool:
    """Return whether encoder and heads are compiled; with "auto" only on GPUs whose machine has the tools for it."""
    return config.compile == "on" or (config.compile == "auto" and device.type == "cuda" and not lacks(device)[0])


def compilation(config: PretrainConfig, device: torch.device) -> list[str]:
    """Return a line on what is compiled or cannot be; no line if nothing is to be compiled."""
    missing, install = lacks(device)
    if missing and device.type == "cuda":
        return [f"without {missing} nothing is compiled and no loss is fused, which is slower: {install}"]
    if not compiles(config, device):
        return []
    if device.type == "cpu":
        return ["compiles in the first step, half a minute the first time"]
    return ["compiles in the first step"]


def online_probe(config: PretrainConfig, ranks: Ranks, parts: Parts, say: Callable[[str], None]) -> OnlineProbe | None:
    """Return the online probe, or None if there are no labels or it is turned off.

    Pretraining needs no test split: without one of the same classes, training images are held out, which is said.
    """
    source = parts.source
    labels = source.facts.labels
    if not config.online.every or labels is None or not source.facts.has_classes:
        return None
    if np.bincount(labels).max() < 2:
        return None
    try:
        test = sources.build(config.source, "test", config.data, say=say, training=source)
        lines = [f"to probe on: {test.describe()}", *test.notes]
    except (MissingInput, DataError) as error:
        test, lines = None, [str(error)]
    if test is None or test.facts.labels is None:
        if len(source) < HELD_OUT_DIVISOR:
            say(f"{lines[0]}; no online probe: {len(source)} training images are too few to hold some out")
            return None
        lines[0] += "; the online probe classifies training images instead"
    for line in lines:
        say(line)

    def evaluation(split: Source) -> Loader:
        return data.evaluation(
            replace(config.data, max_bad=1.0),
            split,
            parts.plan.eval_view,
            batch_size=max(1, config.batch_size // ranks.world_size),
            ranks=ranks,
            dtype=parts.plan.input_dtype,
        )

    return OnlineProbe(config.online, source, test, evaluation, parts.plan.autocast, config.seed)

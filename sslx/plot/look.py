"""``sslx look``: a sheet of the views that a recipe would train on, and of what each augmentation does alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from sslx import by_name, data, plot
from sslx.config import PretrainConfig, settle
from sslx.console.bars import say_to
from sslx.console.words import plural, shown
from sslx.data import sources, statistics
from sslx.data.augment import Augment
from sslx.data.order import Repeated, Shuffled
from sslx.data.sources import Source
from sslx.data.views import MAX_SIGMA, MIN_SIGMA, ViewSpec, for_images
from sslx.distributed import Ranks
from sslx.errors import StorageError
from sslx.machine import devices, files
from sslx.plot.pictures import MIN_VIEWS, rows_of_views

_OFF = {"min_scale": 1.0, "max_scale": 1.0, "max_ratio": 1.0, "flip": 0.0, "jitter": 0.0, "gray": 0.0, "blur": 0.0,
        "solarize": 0.0, "vertical_flip": 0.0, "right_angles": 0.0, "rotate": 0.0, "gain": 0.0,
        "noise": 0.0}  # fmt: skip
"""The augmentation that only takes the central square."""


@dataclass(frozen=True)
class Operation:
    """One operation of an augmentation, alone and always applied.  detail: its strength, in words."""

    name: str
    detail: str
    spec: ViewSpec


def main(config: PretrainConfig, output: Path, num_images: int) -> int:
    """Write the sheet for a config, without building its encoder, and return the exit code."""
    say = say_to(Console(), True)
    source = sources.build(config.source, "pretrain", config.data, say=say)
    for line in (source.describe(), *source.notes):
        say(line)
    config, reasons = settle(config, config.data.size or source.facts.size, len(source))
    for line in reasons:
        if "--data." in line or "--augment." in line:
            say(line)
    try:
        draw(config, source, output, num_images, say)
    except OSError as error:
        raise StorageError(f"cannot write {shown(output)}: {files.reason(error)}") from error
    say(f"wrote {shown(output)}")
    return 0


def draw(config: PretrainConfig, source: Source, path: Path, num_images: int, say: Callable[[str], None]) -> None:
    """Draw the first training images: their views by the loader that a run of one rank has, and each operation."""
    size = config.data.size or source.facts.size
    plain = statistics.evaluation_view(config.data, source, say)
    views = for_images(config.method.inputs(config.augment, size).views, plain)
    steps = operations(views)
    # The views come first, because the random numbers of a view depend on its number.
    specs = [*views, *(step.spec for step in steps), plain]
    epochs, index = _batches(config, source, specs, min(num_images, len(source)), -(-MIN_VIEWS // len(views)), say)
    seen = [plot.Row("as in probes", f"without augmentation, {plain.size} px", plot.rgb(epochs[0][-1], plain))]
    for epoch, batch in enumerate(epochs, 1):
        when = f"epoch {epoch}" if len(epochs) > 1 else ""
        for name, images in rows_of_views(batch[: len(views)], views[0]):
            seen.append(plot.Row(name, when, plot.rgb(images, views[0])))
    alone = [
        plot.Row(step.name, step.detail, plot.rgb(images, step.spec))
        for step, images in zip(steps, epochs[0][len(views) :], strict=False)
    ]
    first = f"the first {plural(index, 'image')} of {shown(source.name)}"
    plot.sections(
        [("What the encoder sees", seen), ("Each augmentation alone, always applied", alone)],
        path,
        f"{config.name}: views of {by_name.label(config.method.name)}",
        f"{first} that a run with seed {config.seed} would train on{plot.drawn_channels(plain)}",
    )


def _batches(
    config: PretrainConfig,
    source: Source,
    specs: Sequence[ViewSpec],
    num_images: int,
    num_epochs: int,
    say: Callable[[str], None],
) -> tuple[list[tuple[Tensor, ...]], int]:
    """Return the views of the first training images in each of the first epochs, and the number of images."""
    blocks = source.facts.blocks
    index = Shuffled(num_samples=len(source), batch_size=num_images, seed=config.seed, blocks=blocks).batch(0)
    order = Repeated(index=index, num_epochs=num_epochs)
    ranks = Ranks(device=devices.of_rank(config.device, 0))
    loader = data.in_order(
        config.data, source, specs, order, seed=config.seed, ranks=ranks, dtype=torch.float32, say=say
    )
    return [tuple(view.cpu().clone() for view in batch.views) for batch in loader], len(index)


def operations(views: Sequence[ViewSpec]) -> list[Operation]:
    """Return the operations of the views in the order in which they are applied, each once, with its probabilities."""
    parts: dict[str, list[tuple[ViewSpec, Augment, str, str]]] = {}
    numbers: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for number, spec in enumerate(views, 1):
        if spec.augment is None:
            continue
        for name, detail, probability, alone in _operations(spec, spec.augment):
            if (name, detail) not in numbers:
                parts.setdefault(name, []).append((spec, alone, name, detail))
            numbers.setdefault((name, detail), []).append((number, probability))
    return [
        Operation(name, _detail(detail, numbers[name, detail], len(views)), replace(spec, augment=alone))
        for found in parts.values()
        for spec, alone, name, detail in found
    ]


def _operations(spec: ViewSpec, a: Augment) -> list[tuple[str, str, float, Augment]]:
    """Return the name, strength and probability of each operation of a view, and the augmentation that is it alone."""
    off = replace(a, **_OFF)
    crop = {"min_scale": a.min_scale, "max_scale": a.max_scale, "max_ratio": a.max_ratio}
    strengths = ("brightness", "contrast", "saturation", "hue")
    jitter = ", ".join(f"{name} {getattr(a, name):g}" for name in strengths if getattr(a, name))
    found = [
        ("crop", f"{a.min_scale:.3g} to {a.max_scale:.3g} of the area, {spec.size} px", 1.0, crop),
        ("flip", "", a.flip, {"flip": 1.0}),
        ("vertical flip", "", a.vertical_flip, {"vertical_flip": 1.0}),
        ("right angles", "90, 180 or 270 degrees", a.right_angles, {"right_angles": 1.0}),
        ("rotation", f"up to {a.max_angle:g} degrees", a.rotate, {"rotate": 1.0}),
        ("color jitter", jitter, a.jitter if jitter else 0.0, {"jitter": 1.0}),
        ("gray", "", a.gray, {"gray": 1.0}),
        ("blur", f"sigma {MIN_SIGMA:g} to {MAX_SIGMA:g} px", a.blur, {"blur": 1.0}),
        ("solarize", "inverts values of 128 and more", a.solarize, {"solarize": 1.0}),
        ("gain", f"of each channel, strength {a.gain_strength:g}", a.gain, {"gain": 1.0}),
        ("noise", f"standard deviation up to {a.max_noise:g} of full scale", a.noise, {"noise": 1.0}),
    ]
    return [(name, detail, p, replace(off, **changes)) for name, detail, p, changes in found if p]


def _detail(strength: str, found: Sequence[tuple[int, float]], num_views: int) -> str:
    """Return the strength of an operation and the probabilities with which the views use it."""
    views_of: dict[float, list[int]] = {}
    for number, probability in found:
        views_of.setdefault(probability, []).append(number)
    parts: list[str] = []
    for probability, numbers in views_of.items():
        often = f"p\xa0=\xa0{probability:g}" if probability < 1 else "always"
        if len(numbers) < num_views:
            often += f" in {_names(numbers)}"
        if often != "always":
            parts.append(often)
    return "; ".join(part for part in (strength, ", ".join(parts)) if part)


def _names(numbers: Sequence[int]) -> str:
    if len(numbers) > 2 and list(numbers) == list(range(numbers[0], numbers[-1] + 1)):
        return f"views {numbers[0]} to {numbers[-1]}"
    return f"view{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"

"""Odd files: over a thousand image files that libraries ship for their tests, and made ones, read by every backend.

    python benchmarks/run.py odd_files

The files come from Pillow's source distribution and from pydicom's package, neither of which enters this repository;
others are made, of every format, bit depth and number of bands, whole and cut, with flipped bits and wrong names, and
of extreme sizes.  Real processes, one a backend, read each file, and another reads it with the libraries themselves.
Each file must be the picture of the reference reader, pixel by pixel, or be named as unreadable with a reason; all
backends must read the same files; and no process may die.  Images of more than 8 bits must be a linear function of
their values up to rounding, which they are not if values are cut off or wrap around.
"""

import json
import multiprocessing
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import odd_files
import torch
from harness import Session, benchmark, option
from PIL import Image

from sslx import data
from sslx.data import views
from sslx.data.codecs import formats, headers
from sslx.data.facts import Facts
from sslx.data.sources import Files
from sslx.data.views import ViewSpec
from sslx.distributed import Ranks

Array = npt.NDArray[Any]
Report = dict[str, Any]
_LIMIT_S = 120.0
_MAX_SIDE = 4096
_ROUNDING = 1.01
"""The most by which a pixel may differ from the reference, on the scale of 0 to 255: decoders round differently."""
_WRONG = ("crashed", "backends disagree", "backends differ", "differs from the reference")
"""Verdicts of which there must be none."""
LIBRARIES = ("pillow", "pydicom", "pillow-heif", "tifffile", "imagecodecs", "nvidia-dali-cuda130")


def _view(backend: str, path: Path, good: Path) -> Report | tuple[int, int, Array]:
    """Return height, width and the central square, (S, S, 3), of a file, or why it is refused."""
    try:
        height, width = formats.size(str(path))[:2]
    except headers.Unreadable:
        height = width = 8
    side = min(height, width, _MAX_SIDE)
    spec = ViewSpec(size=side, mean=(0, 0, 0), std=(1 / 255, 1 / 255, 1 / 255))
    said: list[str] = []
    source = Files(name="odd", facts=Facts(num_samples=2, size=side), paths=[str(path), str(good)])
    loader = data.evaluation(
        data.Config(backend=cast(Any, backend), threads=int(backend == "dali"), max_bad=1.0),
        source,
        spec,
        batch_size=2,
        ranks=Ranks(device=torch.device("cpu")),
        dtype=torch.float32,
        say=said.append,
    )
    picture = next(loader).views[0][0].permute(1, 2, 0).numpy()
    loader.close()
    if loader.bad:
        return {"refused": said[0].partition(f"{path} (")[2].partition("): replaced")[0]}
    return height, width, picture


def _bands(_: str, path: Path, __: Path) -> Report | tuple[int, int, Array]:
    """Return height, width and the central square of the values of a file of any number of bands, as sslx holds it."""
    try:
        values = formats.values(str(path)).array
    except headers.Unreadable as error:
        return {"refused": str(error)}
    return _center(values)


def _reference(_: str, path: Path, __: Path) -> Report | tuple[int, int, Array]:
    """Return height, width and the central square of the values of a file, or why no reader reads it."""
    import odd_reference

    try:
        values = odd_reference.read(path)
    except Exception as error:  # whatever the readers raise at damaged files
        return {"refused": f"{type(error).__name__}: {str(error)[:200]}"}
    if values.ndim not in (2, 3):
        return {"refused": f"{values.ndim} dimensions"}
    return _center(values)


def _center(values: Array) -> tuple[int, int, Array]:
    """Return height, width and the central square of (H, W) or (H, W, C)."""
    height, width = values.shape[:2]
    top, left, bottom, right = views.boxes(ViewSpec(size=min(height, width)), None, [height], [width])[0].tolist()
    return height, width, np.ascontiguousarray(values[top:bottom, left:right])


def _arm(kind: str, paths: Sequence[Path], good: Path, place: Path, first: int) -> None:
    """Read files from ``first`` on, and write what came of each."""
    torch.set_num_threads(1)
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 2)  # libraries tell a terminal about damaged files
    read = {"reference": _reference, "values": _bands}.get(kind, _view)
    for number in range(first, len(paths)):
        try:
            outcome = read(kind, paths[number], good)
        except Exception as error:
            outcome = {"raised": f"{type(error).__name__}: {str(error)[:300]}"}
        if isinstance(outcome, tuple):
            height, width, picture = outcome
            np.save(place / f"{number}.npy", picture)
            outcome = {"shape": [height, width]}
        (place / f"{number}.part").write_text(json.dumps(outcome))
        os.rename(place / f"{number}.part", place / f"{number}.json")


def _outcomes(kind: str, paths: Sequence[Path], good: Path, place: Path) -> list[Report]:
    """Return what came of each file, read in a process that is started again behind a file at which it dies."""
    place.mkdir()
    context = multiprocessing.get_context("spawn")
    first = 0
    while first < len(paths):
        process = context.Process(target=_arm, args=(kind, paths, good, place, first))
        process.start()
        since = time.monotonic()
        while process.is_alive():
            process.join(0.2)
            at = first
            while (place / f"{at}.json").exists():
                at += 1
            if at > first:
                first, since = at, time.monotonic()
            elif time.monotonic() - since > _LIMIT_S:
                process.kill()
        while (place / f"{first}.json").exists():
            first += 1
        if first < len(paths):
            (place / f"{first}.json").write_text(json.dumps({"died": process.exitcode}))
            print(f"  {kind} died at {paths[first].name}: exit code {process.exitcode}")
            first += 1
    return [json.loads((place / f"{number}.json").read_text()) for number in range(len(paths))]


def _differs(picture: Array, values: Array) -> str:
    """Return how a picture (S, S, 3) from 0 to 255 differs from the reference's values, or ""."""
    if picture.shape[:2] != values.shape[:2]:
        return f"{picture.shape[:2]} pixels, expected {values.shape[:2]}"
    if values.ndim == 2 or values.shape[2] == 1:
        values = np.repeat(values.reshape(*values.shape[:2], 1), 3, axis=2)
    if values.dtype == np.bool_:
        values = values * np.uint8(255)
    if values.shape[2] != 3:
        return f"a picture of {values.shape[2]} bands"
    if values.dtype == np.uint8:
        difference = np.abs(picture - values.astype(np.float64)).max()
    else:
        difference = _from_a_line(values.astype(np.float64), picture.astype(np.float64))
    return "" if difference <= _ROUNDING else f"by up to {difference:.1f} of 255"


def _from_a_line(values: Array, picture: Array) -> float:
    """Return the largest distance of a picture from a rising linear function of the values.

    Black and white are not stated by such files, so the function is whichever is nearest: fitted, or from a full scale.
    """
    low, span = values.min(), values.max() / 2 - values.min() / 2  # halves, which do not overflow
    if not span > 0:
        return float(picture.max() - picture.min())
    places = (values / 2 - low / 2) / span
    slope = np.cov(places.ravel(), picture.ravel(), bias=True)[0, 1] / places.var()
    lines = [picture - (slope * (places - places.mean()) + picture.mean())] if slope > 0 else []
    lines += [picture - values * (255 / (2.0**bits - 1)) for bits in range(8, 33)]
    return min(float(np.abs(line).max()) for line in lines)


def _verdict(reports: dict[str, Report], pictures: Callable[[str], Array], backends: Sequence[str]) -> tuple[str, str]:
    """Return the verdict on a file and the reason."""
    own = [reports[backend] for backend in backends]
    for backend, report in zip(backends, own, strict=True):
        if "died" in report or "raised" in report:
            return "crashed", f"{backend}: {report}"
    reasons = {report.get("refused", "") for report in own}
    if len(reasons) > 1:
        return "backends disagree", " | ".join(sorted(reasons))
    if "refused" in own[0]:
        refused_by_all = "refused" in reports["reference"] or "died" in reports["reference"]
        if refused_by_all or " bands; " not in own[0]["refused"]:
            return "named as unreadable" if refused_by_all else "named as not supported", own[0]["refused"]
        values, expected = pictures("values"), pictures("reference")
        is_same = values.shape == expected.shape and np.array_equal(
            values, expected, equal_nan=values.dtype.kind == "f"
        )
        return "bands equal to the reference" if is_same else "differs from the reference", own[0]["refused"]
    first, *others = (pictures(backend) for backend in backends)
    for other in others:
        if first.shape != other.shape or np.abs(first - other).max() > _ROUNDING:
            return "backends differ", ""
    if "shape" not in reports["reference"]:
        return "read, no reference", str(reports["reference"])
    if max(reports["reference"]["shape"]) > _MAX_SIDE < min(reports["reference"]["shape"]):
        return "read, too large to compare", ""
    difference = _differs(first, pictures("reference"))
    return ("differs from the reference", difference) if difference else ("equal to the reference", "")


@benchmark(
    option("--seed", type=int, default=0, help="of the made files"),
    option("--every", type=int, default=1, help="read only every so many-th file"),
    option("--show", default="", help="print the files with this verdict, or all of them with 'all'"),
    option("--keep", type=Path, default=None, help="folder to keep the files and what came of them in"),
)
def run(session: Session) -> bool:
    options = session.options
    place = options.keep or Path(tempfile.mkdtemp(prefix="odd_files."))
    place.mkdir(exist_ok=True)
    good = place / "good.png"
    Image.fromarray(np.random.default_rng(options.seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(good)
    groups = {
        "pillow": odd_files.pillow_tests(place),
        "pydicom": odd_files.pydicom_tests(),
        "made": odd_files.made(place / "made", options.seed),
    }
    groups = {name: paths[:: options.every] for name, paths in groups.items()}
    paths = [path for group in groups.values() for path in group]
    origins = [name for name, group in groups.items() for _ in group]
    backends, started = ("torchvision", "dali"), time.monotonic()
    reports: dict[str, list[Report]] = {}
    for kind in (*backends, "values", "reference"):
        print(f"{kind} reads {len(paths):,} files")
        reports[kind] = _outcomes(kind, paths, good, place / kind)
    verdicts, reasons = Counter[str](), Counter[str]()
    for number, (path, origin) in enumerate(zip(paths, origins, strict=True)):
        verdict, reason = _verdict(
            {kind: found[number] for kind, found in reports.items()},
            lambda kind, number=number: np.load(place / kind / f"{number}.npy"),
            backends,
        )
        verdicts[f"{origin}: {verdict}"] += 1
        reasons[verdict] += 1
        if options.show in ("all", verdict) or verdict in _WRONG:
            print(f"{verdict}: {origin} {path.name} {reason}")
    for verdict, count in sorted(verdicts.items()):
        print(f"{count:6} {verdict}")
    wrong = {verdict: reasons[verdict] for verdict in _WRONG}
    session.record(num_files=len(paths), verdicts=dict(reasons), by_origin=dict(verdicts), wrong=wrong,
                   seed=options.seed, backends=backends, seconds=round(time.monotonic() - started),
                   libraries={name: metadata.version(name) for name in LIBRARIES})  # fmt: skip
    if options.keep is None:
        shutil.rmtree(place)
    return not any(wrong.values())

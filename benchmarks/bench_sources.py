"""Sources: samples/s of the loader on the same images as files in a folder, as tar shards and as tables, in turns.

    python benchmarks/run.py sources --root DIR --size 224      (ImageNet recipe)
    python benchmarks/run.py sources --root DIR --size 32       (CIFAR recipe: no blur, half the jitter)

The images are written once, into a temporary folder: tar shards of 1,000 images, Parquet files in groups of 100 rows,
and an Arrow file as Hugging Face's ``save_to_disk`` writes it.  Reading is from the page cache.
"""

import io
import os
import tarfile
import tempfile
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import images
import torch
from bench_loader import CIFAR, of_source, timed
from harness import Session, benchmark, option

from sslx.bench import measure
from sslx.data.sources import SourceConfig, folder, parquet, tar
from sslx.data.views import Augment
from sslx.machine import cores

PER_SHARD, PER_GROUP = 1000, 100


def written(paths: Sequence[str], place: Path) -> dict[str, SourceConfig]:
    """Write the images in each form; return the config of the source of each."""
    arrow: Any = import_module("pyarrow")  # an extra of sslx
    tables: Any = import_module("pyarrow.parquet")
    shards, rows, stream = place / "shards", place / "tables", place / "saved"
    for made in (shards, rows, stream):
        made.mkdir()
    kind = arrow.schema([("image", arrow.binary())])
    with arrow.ipc.new_stream(stream / "data.arrow", kind) as batches:
        for number, start in enumerate(range(0, len(paths), PER_SHARD)):
            part = [Path(path) for path in paths[start : start + PER_SHARD]]
            contents = [path.read_bytes() for path in part]
            with tarfile.open(shards / f"{number:06}.tar", "w") as archive:
                for place_in_part, (path, content) in enumerate(zip(part, contents, strict=True)):
                    member = tarfile.TarInfo(f"{place_in_part:06}{path.suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
            table = arrow.table({"image": contents}, schema=kind)
            tables.write_table(table, rows / f"{number:06}.parquet", row_group_size=PER_GROUP)
            batches.write_table(table, max_chunksize=PER_GROUP)
    return {
        "tar": tar.Config(root=shards),
        "parquet": parquet.Config(root=rows),
        "arrow": parquet.Config(root=stream),
    }


@benchmark(
    option("--root", type=Path, required=True, help="folder of images"),
    option("--size", type=int, default=224, help="side of the views, in pixels"),
    option("--backend", default="dali", choices=("dali", "torchvision"), help="of the loader"),
    option("--batch-size", type=int, default=0, help="default: 256 up to 64 px, otherwise 64"),
    windows=5,
    seconds=8.0,
)
def run(session: Session) -> None:
    options = session.options
    torch.set_num_threads(1)
    augment = CIFAR if options.size <= 64 else Augment()
    batch_size = options.batch_size or (256 if options.size <= 64 else 64)
    with tempfile.TemporaryDirectory() as place:
        configs = {"folder": folder.Config(root=options.root, splits="none")}
        configs |= written(images.paths(options.root), Path(place))
        arms = {
            name: timed(
                lambda config=config: of_source(
                    config, options.backend, options.size, augment, batch_size, cores.allowed()
                ),
                batch_size,
                options.seconds,
            )
            for name, config in configs.items()
        }
        rates = {name: measure.summarize(values) for name, values in measure.take_turns(arms, options.windows).items()}
    for name, summary in rates.items():
        print(f"{name:10} {measure.text(summary, 1)} samples/s")
    paths = images.paths(options.root)
    ratios = {name: summary["median"] / rates["folder"]["median"] for name, summary in rates.items()}
    session.record(size=options.size, batch_size=batch_size, backend=options.backend, images=options.root.name,
                   num_images=len(paths), num_bytes=sum(map(os.path.getsize, paths)),
                   samples_per_s=rates, ratio_to_folder=ratios)  # fmt: skip

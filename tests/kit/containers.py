"""The same image files as a list, tar shards, tables and arrays, and the config of the source that reads each."""

import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from sslx.data.sources import SourceConfig, config

Kind = Literal["list", "tar", "parquet", "arrow"]
KINDS: tuple[Kind, ...] = ("list", "tar", "parquet", "arrow")
PER_SHARD = 5
"""Images in a tar file, and in a group of rows."""


def tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    """A tar file of these members, by name and content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            about = tarfile.TarInfo(name)
            about.size = len(content)
            archive.addfile(about, io.BytesIO(content))
    return path


def table(columns: dict[str, Any], classes: Sequence[str] = ()) -> Any:
    """A pyarrow table.  classes: their names, as Hugging Face's datasets note them in the schema."""
    arrow: Any = import_module("pyarrow")
    made = arrow.table(columns)
    if classes:
        features = {"label": {"names": list(classes), "_type": "ClassLabel"}}
        made = made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    return made


def parquet(path: Path, columns: dict[str, Any], classes: Sequence[str] = ()) -> Path:
    """A Parquet file of these columns, in groups of PER_SHARD rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    import_module("pyarrow.parquet").write_table(table(columns, classes), path, row_group_size=PER_SHARD)
    return path


def arrow(path: Path, columns: dict[str, Any], classes: Sequence[str] = ()) -> Path:
    """An Arrow file as Hugging Face's ``save_to_disk`` writes it: a stream of batches of PER_SHARD rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made = table(columns, classes)
    with import_module("pyarrow").ipc.new_stream(path, made.schema) as stream:
        stream.write_table(made, max_chunksize=PER_SHARD)
    return path


def written(kind: Kind, paths: Sequence[str], labels: Sequence[int], folder: Path) -> SourceConfig:
    """Write these image files with their labels in another form, and return the config of the source of it."""
    contents = [Path(path).read_bytes() for path in paths]
    if kind == "list":
        lines = [f"{path},{label}" for path, label in zip(paths, labels, strict=True)]
        (folder / "list.csv").write_text("\n".join(["path,label", *lines]))
        return config("list")(name="list", root=folder / "list.csv")  # pyright: ignore[reportCallIssue]
    if kind == "tar":
        members = [
            pair
            for i, (path, content, label) in enumerate(zip(paths, contents, labels, strict=True))
            for pair in ((f"{i:03}{Path(path).suffix}", content), (f"{i:03}.cls", str(label).encode()))
        ]
        for number, start in enumerate(range(0, len(members), 2 * PER_SHARD)):
            tar(folder / "shards" / f"{number}.tar", members[start : start + 2 * PER_SHARD])
        return config("tar")(name="tar", root=folder / "shards")  # pyright: ignore[reportCallIssue]
    columns = {"image": [{"bytes": content, "path": None} for content in contents], "label": list(labels)}
    if kind == "parquet":  # in two files
        middle = len(paths) // 2 + 1
        parquet(folder / "tables" / "0.parquet", {name: values[:middle] for name, values in columns.items()})
        parquet(folder / "tables" / "1.parquet", {name: values[middle:] for name, values in columns.items()})
    else:
        arrow(folder / "tables" / "data-00000-of-00001.arrow", columns)
    return config("parquet")(name="parquet", root=folder / "tables")  # pyright: ignore[reportCallIssue]

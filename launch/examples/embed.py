"""Write the features of all images below a folder: python launch/examples/embed.py RUN FOLDER vectors.npy

Beside ``vectors.npy``, (N, dim) float32, ``vectors.txt`` names the image of each row.
"""

import sys
from pathlib import Path

import numpy as np

import sslx


def main(run: str, folder: str, file: str) -> None:
    """Read the encoder of a run, embed every JPEG and PNG file, and write both files."""
    paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    trained = sslx.load(run)
    vectors = trained.embed(paths)
    np.save(file, vectors.numpy())
    Path(file).with_suffix(".txt").write_text("".join(f"{path}\n" for path in paths))
    print(f"{len(paths)} images, {trained.dim} numbers each: {file}")


if __name__ == "__main__":
    main(*sys.argv[1:])

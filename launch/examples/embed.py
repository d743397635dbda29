"""Write the features of all images below a folder: python launch/examples/embed.py RUN FOLDER vectors.npy

Beside ``vectors.npy``, (N, dim) float32, ``vectors.txt`` names the image of each row.  For more images than fit in
memory, and for many GPUs, use ``sslx embed``.
"""

import sys
from pathlib import Path

import numpy as np

import sslx


def main(run: str, folder: str, file: str) -> None:
    """Read the encoder of a run, embed every image, and write both files."""
    paths = sslx.image_paths(folder)
    trained = sslx.load(run)
    vectors = trained.embed(paths, as_numpy=True)
    np.save(file, vectors)
    Path(file).with_suffix(".txt").write_text("".join(f"{path}\n" for path in paths))
    print(f"{len(paths)} images, {trained.dim} numbers each: {file}")


if __name__ == "__main__":
    main(*sys.argv[1:])

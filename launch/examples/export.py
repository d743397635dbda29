"""Export a trained encoder: python launch/examples/export.py RUN FOLDER [timm torchvision hf safetensors onnx]

Each export is a folder in FOLDER, with a README.md that says how it is loaded and how the encoder was trained.
"""

import sys
from pathlib import Path

import sslx
from sslx.errors import ConfigError
from sslx.export import exporter


def main(run: str, folder: str, *targets: str) -> None:
    """Export to each target, or to all, and print the difference of the features or why the target has no such one."""
    trained = sslx.load(run)
    for target in targets or exporter.TARGETS.available():
        try:
            difference = exporter.export(trained, target, Path(folder) / target)
        except ConfigError as error:
            print(f"{target}: {error}")
        else:
            print(f"{target}: {Path(folder) / target}, features equal within {difference:.0e}")


if __name__ == "__main__":
    main(*sys.argv[1:])

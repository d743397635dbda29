"""``sslx verify [METHOD ...] [flags]``."""

from collections.abc import Sequence

from sslx import config, methods
from sslx.machine import environment


def main(argv: Sequence[str]) -> int:
    """Train with one process, then with several, and compare.  Return 0 if all agree, else 1."""
    settings = config.load_verify(argv, quiet=environment.launched_rank() is not None)
    for name in settings.methods:
        methods.options(name)  # refuses an unknown method before anything starts
    from sslx.train import verify  # imports torch, which takes seconds

    return verify.main(argv, settings)

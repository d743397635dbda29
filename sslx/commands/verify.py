"""``sslx verify [METHOD ...] [flags]``."""

from collections.abc import Sequence

from sslx import config, methods
from sslx.machine import environment


def main(argv: Sequence[str]) -> int:
    """Run one process, then several, and compare; 0 where all agree, 1 where not."""
    wanted = config.load_verify(argv, quiet=environment.joined() is not None)
    for name in wanted.methods:
        methods.options(name)  # an unknown one is refused before anything starts
    from sslx.train import verify  # it takes torch, and so seconds

    return verify.main(argv, wanted)

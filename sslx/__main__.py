"""``python -m sslx`` is the ``sslx`` command."""

import sys

from sslx.cli import main

if __name__ == "__main__":
    sys.exit(main())

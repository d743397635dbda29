"""The old place of ``sslx.cluster.requeue``, for jobs that were queued by sslx 0.1: ``python -m sslx.requeue``."""

import sys

from sslx.cluster.requeue import end

if __name__ == "__main__":
    end(sys.argv[1:])

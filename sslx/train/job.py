"""The old place of ``sslx.cluster.job``, for jobs that were queued by sslx 0.1: their pickles and batch scripts."""

import sys

from sslx.cluster.job import Job as Job
from sslx.cluster.job import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

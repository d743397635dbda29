"""The former name of ``sslx.cluster.job``, kept for the pickles and scripts of jobs that sslx 0.1 queued."""

import sys

from sslx.cluster.job import Job as Job
from sslx.cluster.job import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

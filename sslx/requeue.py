"""The former name of ``sslx.cluster.requeue``, kept for jobs that sslx 0.1 queued."""

import sys

from sslx.cluster.requeue import run_and_exit

if __name__ == "__main__":
    run_and_exit(sys.argv[1:])

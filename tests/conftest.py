"""The whole suite runs in as many processes as there are cores (`make test`): one thread for each then."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

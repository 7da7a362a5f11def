"""One thread for every test and every process that a test starts: tiny models gain nothing from more."""

import os

# read when torch is first imported, which no test module has done yet
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"

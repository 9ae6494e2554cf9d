"""What all tests share: one thread a process, since tests that start processes would fight over the cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

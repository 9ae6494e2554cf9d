"""What all tests share: one thread a process, since tests that start processes would fight over the cores."""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")
# A job in the background ignores Ctrl-C, and so would the programs that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

"""Around the core: what the notebooks need to run, keep, judge, draw and repeat a study."""

import contextlib
import ctypes

# By itself glibc gives each large tensor back to the system and fetches its pages anew for the next, a tenth of the time of
# training and of sampling on a CPU: it is told to keep up to 64 MiB.
with contextlib.suppress(AttributeError, OSError, TypeError):  # another library of C
    for option, value in ((-3, 2**25), (-1, 2**26)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
        ctypes.CDLL(None).mallopt(option, value)

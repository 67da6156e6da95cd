"""What knows no config. Comes before torch wherever both are imported: threads of OpenMP read this when they load."""

import os

# Threads that wait spin for some microseconds, then sleep. By default they spin fifty times longer and take the
# cores of every other program: two trainings on 2 cores stood still. To sleep at once costs a fifth of a step.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ.setdefault("GOMP_SPINCOUNT", "6000")  # of GNU's OpenMP, which torch brings on Linux

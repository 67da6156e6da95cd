"""What knows no config. Comes before torch wherever both are imported: threads of OpenMP read this when they load."""

import os

# Threads that wait sleep. Spinning ones take the cores of every other program: two trainings on 2 cores stood still.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

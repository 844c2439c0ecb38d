"""What fastattn is for, run end to end: `python -m examples.demo`."""

import os

# Threads that wait for each other by spinning stand still for whole time slices when another process needs their
# core. Read when torch is loaded, so it is set before; for all that runs here, fastattn and torch alike.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

"""The backends in C++: `cpu` and `cuda`, and what they share. The modules they call are built from csrc/."""

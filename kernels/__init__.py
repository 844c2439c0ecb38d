"""Triton kernels of fastattn. Importing this package needs neither a GPU nor Triton."""

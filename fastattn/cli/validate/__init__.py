"""`python -m fastattn validate`: every feature on every backend of this machine against float64."""

from .command import add_arguments, run

__all__ = ["add_arguments", "run"]

"""`python -m benchmarks`: the same command as `python -m fastattn bench`."""

import argparse
import sys

from .cli import add_arguments, run


def main() -> int:
    """Parses the command line and runs it; returns the exit status."""
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    add_arguments(parser)
    return run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())

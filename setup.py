"""Build script: the static metadata is in pyproject.toml; native extensions are added here."""

from setuptools import setup

setup()

"""The part of the configuration that pyproject.toml cannot hold: build_llama.py makes the package's compiled files."""

from setuptools import setup

import build_llama

setup(**build_llama.setup_arguments())

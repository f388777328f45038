"""What pyproject.toml cannot say: the package has compiled files, and build_llama.py makes them."""

from setuptools import setup

import build_llama

setup(**build_llama.setup_arguments())

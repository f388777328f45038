"""The C++ side of trio-runner. As a Python package it holds the build (`native.build`) and is never installed."""

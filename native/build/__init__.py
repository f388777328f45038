"""The parts of build_llama.py. They build llama.cpp, our shim over it, and the cffi module on top.

Nothing here imports trio_runner. Only the standard library is needed until the cffi module is made (`binding`).

Changing a file here compiles nothing again: the build copies and hashes the C++ and CMake files of native/ only.
"""

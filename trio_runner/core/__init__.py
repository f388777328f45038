"""The decisions, and nothing else: no I/O, no thread, no clock, no cffi, no trio."""

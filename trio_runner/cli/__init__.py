"""The command line: `trio-runner serve | run | chat | embed | rerank | info | bench | fetch`, and the drop-in mode.

Rule 1: what the user asked for goes to stdout, everything else to stderr.
Rule 2: exit codes are 0; 1 for a failure that one line on stderr explains; 2 for a wrong command line; 128 plus the
number of the signal for a command that a signal ended. `serve` ends with 0 on SIGTERM and SIGINT, which ask it to stop.
Rule 3: heavy modules are imported in the functions that use them, so that `--help` is quick and works without the
native library.
"""

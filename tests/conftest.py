"""What all tests share."""

from __future__ import annotations

import signal

from hypothesis import HealthCheck, settings

# The same examples on every run and no deadline: a slow machine must not turn a passing test into a failing one.
settings.register_profile(
    "ci", derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("explore", deadline=None, max_examples=2000)
settings.load_profile("ci")

# Whoever is started in the background of a shell ignores Ctrl-C, and so does every program that the tests start then.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

"""`python -m trio_runner` is `trio-runner`."""

from __future__ import annotations

import signal
import sys


def main() -> int:
    """`cli.main`, which cannot catch a Ctrl-C itself while it is still being imported."""
    try:
        from trio_runner import cli
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())

"""`python -m trio_runner` does the same as `trio-runner`."""

from __future__ import annotations

import signal
import sys


def main() -> int:
    """Call `cli.main`. Catches the Ctrl-C that comes while `cli` is being imported, which `cli` itself cannot."""
    try:
        from trio_runner import cli
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())

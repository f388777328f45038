"""`python -m trio_runner` does the same as `trio-runner`."""

from __future__ import annotations

import signal
import sys


def main() -> int:
    """Run the program. Catches the Ctrl-C that comes while `cli` is being imported, which `cli` itself cannot."""
    try:
        from trio_runner.cli.main import main as run
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return run()


if __name__ == "__main__":
    sys.exit(main())

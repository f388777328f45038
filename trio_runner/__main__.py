"""`python -m trio_runner` is `trio-runner`."""

from __future__ import annotations

import sys

from trio_runner.cli import main

if __name__ == "__main__":
    sys.exit(main())

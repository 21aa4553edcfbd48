"""``python -m jaxdeploy`` is the ``jaxdeploy`` command."""

from __future__ import annotations

import sys

from jaxdeploy.cli import main

if __name__ == "__main__":
    sys.exit(main())

"""``python -m jaxdeploy`` is the ``jaxdeploy`` command."""

from __future__ import annotations

from jaxdeploy.cli import program

if __name__ == "__main__":
    program()

"""``python -m jaxdeploy.chat [MODEL] [flags]`` is ``jaxdeploy chat [MODEL] [flags]``."""

import sys

from jaxdeploy.cli import program

if __name__ == "__main__":
    program(["chat", *sys.argv[1:]])

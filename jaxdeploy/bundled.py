"""The model that comes with jaxdeploy."""

from __future__ import annotations

from pathlib import Path

from jaxdeploy.errors import ModelNotFoundError

DEMO = Path(__file__).parent / "demo"


def bundled_model() -> str:
    """Return the folder of the bundled model.

    Raises:
        ModelNotFoundError: the installation lacks the folder.
    """
    if not (DEMO / "config.json").is_file():
        raise ModelNotFoundError(f"the bundled model is missing from {DEMO}; name a MODEL, a folder or a hub id")
    return str(DEMO)

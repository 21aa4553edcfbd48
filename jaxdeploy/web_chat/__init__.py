"""The web chat: a page that talks with a model behind a server, this process's own or another. ``run`` is its front."""

from __future__ import annotations

import os

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

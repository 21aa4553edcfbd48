"""Chat in the terminal: ``python -m jaxdeploy.chat [MODEL] [flags]``."""

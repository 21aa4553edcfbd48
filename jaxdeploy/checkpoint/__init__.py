"""Weights on their way in and out: hub or folder → tensor files → parameters on devices, and back to a folder."""

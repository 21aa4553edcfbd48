"""Quantisation: calibrate a checkpoint and store it in fewer bits."""

"""Models: one configurable decoder, and a small file of facts for every family."""

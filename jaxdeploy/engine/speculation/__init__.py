"""Guessing ahead: ``speculation`` is what the engine sees of it; ``ngram`` and ``draft`` guess, each in its own way."""

"""Speculative decoding: drafts from the sequence (``ngram``) or from a model (``draft``), and their acceptance."""

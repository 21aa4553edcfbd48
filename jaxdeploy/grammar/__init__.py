"""Replies that follow a grammar: the form of a reply, its compilation in a worker process, and matching."""

"""The interfaces of an engine: in this process, in a process of its own, asynchronous, and with text."""

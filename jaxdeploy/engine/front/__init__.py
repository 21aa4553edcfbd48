"""The interfaces of an engine: in this process, in a separate process, asynchronous, and with text."""

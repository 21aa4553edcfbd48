"""A proxy in front of several servers: one address, one list of models, and no request that is lost with a server."""

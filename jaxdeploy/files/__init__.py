"""Reading files of a model folder within limits, and writing files atomically."""

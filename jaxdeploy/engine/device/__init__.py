"""The device side of a step: its inputs, the compiled programs and the state that they update."""

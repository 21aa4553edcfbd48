"""What clients send and what they get, one module for each API; everything is checked here and nowhere else."""

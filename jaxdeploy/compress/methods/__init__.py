"""How the integers of a quantised weight are chosen: one file per method."""

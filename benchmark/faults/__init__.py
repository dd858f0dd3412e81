"""Planted faults: the table of mistakes, and planting them to see that tests notice."""

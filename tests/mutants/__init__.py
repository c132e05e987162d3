"""Faults put into the library one at a time, to see that a test notices each."""

"""Powerpropagation: weights as powers of trained parameters, and pruning by magnitude."""

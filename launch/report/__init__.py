"""Compares runs: their curves, speeds, gradients, learned scales and configurations, as one page and pictures."""

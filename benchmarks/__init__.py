"""Timings that the project promises, each against a baseline in the same run."""

"""Scores for Pisces: each reads a checkpoint or a data folder and reports numbers that can be checked."""

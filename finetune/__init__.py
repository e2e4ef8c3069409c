"""Data and training recipes of Pisces: each reads a folder on disk and writes a folder on disk."""

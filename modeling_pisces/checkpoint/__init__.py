"""Checkpoint folders: are they whole and safe, what do they hold, and how they are loaded."""

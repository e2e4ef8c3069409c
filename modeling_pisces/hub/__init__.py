"""Folders for the Hub: written, checked and pushed."""

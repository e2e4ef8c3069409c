"""Flags of the recipes: how they are parsed, and which values make sense."""

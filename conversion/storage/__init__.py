"""Tensors and files on disk: where their bytes lie, and how they are written whole or not at all."""

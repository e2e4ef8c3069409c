"""Prompt sets, folders of drawings, and what judges them."""

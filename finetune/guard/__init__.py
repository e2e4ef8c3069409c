"""Watches both sides during a run: rows, scores and pictures, before, during and after training."""

"""Results files as pages, cards and plots: `python -m evaluation.report`."""

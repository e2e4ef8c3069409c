"""Understanding through lmms-eval: `python -m evaluation.understanding`."""

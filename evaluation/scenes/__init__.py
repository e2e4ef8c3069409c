"""The scenes benchmark: `python -m evaluation.scenes` scores questions, reconstructions and drawings."""

"""Parts of `python -m benchmarks.serving`: a server process, questions with right answers, load, fuzz, kills."""

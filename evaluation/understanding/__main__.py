"""`python -m evaluation.understanding`: what it does stands in `evaluation.understanding.benchmark`."""

from evaluation.understanding.benchmark import main


if __name__ == "__main__":
    main()

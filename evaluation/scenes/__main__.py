"""`python -m evaluation.scenes`: what it does stands in `evaluation.scenes.benchmark`."""

from evaluation.scenes.benchmark import main


if __name__ == "__main__":
    main()

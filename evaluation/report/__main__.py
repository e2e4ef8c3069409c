"""`python -m evaluation.report`: what it does stands in `evaluation.report.pages`."""

from evaluation.report.pages import main


if __name__ == "__main__":
    main()

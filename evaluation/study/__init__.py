"""The paper's claims put to the test at pisces-tiny's size: `python -m evaluation.study`, told in docs/study.md."""

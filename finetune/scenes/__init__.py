"""The toy world of pisces-tiny: `python -m finetune.scenes` renders its pictures, captions, questions and truth."""

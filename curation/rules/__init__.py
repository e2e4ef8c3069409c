"""Decisions from numbers and words, without a network: measures of a picture, thresholds, near copies, captions."""

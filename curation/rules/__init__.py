"""Decisions from numbers and words alone: measures of a picture, thresholds, pairs that are near, captions. Pure."""

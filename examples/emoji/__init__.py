"""Emoji: about 3,700 captioned pictures that any machine can have, as training data, and a judge of what was learned.

`make_data` writes a data folder, `contact_sheet` shows one, `judge` trains a classifier on real emoji, and `evaluate`
scores a Pisces with it. The page is README.md beside this file.
"""

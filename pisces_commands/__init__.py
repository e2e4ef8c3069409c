"""What every command of this repository is made of: arguments, endings, whole-or-nothing writing, measurements.

`pisces` itself is `console.py`. Nothing in here imports torch or transformers before it is needed, so that a wrong
flag is answered at once; nothing in here travels to the Hub.
"""

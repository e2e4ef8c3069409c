"""The page in the browser: chat with pictures, draw, edit, compare an adapter; and the Space that shows it to others.

`demo/app.py` starts the page, `pisces space` writes the Space. What the page does is in `model`, `chat` and `work`,
which know no gradio; how it looks is in `page`.
"""

"""`pisces serve`: one Pisces model behind the HTTP interface that OpenAI's clients speak.

A supervisor (`supervisor.py`, without torch) keeps one serving process alive. In it uvicorn reads requests (`app.py`,
`routes/`, `fields.py`, `pictures.py`), a batcher puts those that may share a batch together (`batcher.py`), and one
thread owns the model and runs them (`worker.py`, `answers.py`). Only the console's `serve` imports this package.
"""

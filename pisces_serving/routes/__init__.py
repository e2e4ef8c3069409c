"""What each endpoint reads, queues and answers; `app.py` puts them under their addresses."""

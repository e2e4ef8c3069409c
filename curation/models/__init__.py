"""What needs a network: agreement of text and picture, aesthetics, questions, captions."""

"""What benchmarks measure on loaded models, apart from the commands that make them."""

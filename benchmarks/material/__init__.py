"""What benchmarks run on: small random models, and pictures with planted faults. Each file belongs to one command."""

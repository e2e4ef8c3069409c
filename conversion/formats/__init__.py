"""What other projects call the same tensors."""

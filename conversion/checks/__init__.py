"""What `conversion.verify` compares, part by part."""

"""What the hardware allows: FLOP, bytes and memory of the real classes, counted without running them."""

"""Plans a checkpoint from parts: its tensors, names, configuration and vocabulary."""

"""What every recipe shares: arguments, adapters, trainers, checkpoints, the folder and card of a run."""

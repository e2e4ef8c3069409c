"""What the commands that train a part from scratch share: their loop, their pictures, the latents of a VAE."""

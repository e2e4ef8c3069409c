"""Pairs, rewards and candidates: what the preference recipes are made of."""

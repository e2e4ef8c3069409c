"""Pisces and stock models of transformers at one language-model shape, each ready to be timed."""

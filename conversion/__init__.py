"""Commands that build a Pisces checkpoint from public parts, and take it apart again."""

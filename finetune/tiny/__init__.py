"""How pisces-tiny was made: `tiny.sh` runs every step. `python -m finetune.tiny` puts the parts together."""

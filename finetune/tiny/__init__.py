"""How pisces-tiny was made: `python -m finetune.tiny` puts its parts together, `tiny.sh` runs every step."""

"""`python -m finetune.tiny`: the older name of `python -m finetune.parts`."""

from finetune.flags.parsing import run_command
from finetune.parts.assemble import main


if __name__ == "__main__":
    run_command(main)

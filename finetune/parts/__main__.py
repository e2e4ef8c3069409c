"""`python -m finetune.parts`: what it does stands in `finetune.parts.assemble`."""

from finetune.flags.parsing import run_command
from finetune.parts.assemble import main


if __name__ == "__main__":
    run_command(main)

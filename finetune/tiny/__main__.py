"""`python -m finetune.tiny`: what it does stands in `finetune.tiny.assemble`."""

from finetune.flags.parsing import run_command
from finetune.tiny.assemble import main


if __name__ == "__main__":
    run_command(main)

"""`python -m finetune.scenes`: what it does stands in `finetune.scenes.render`."""

from finetune.scenes.render import main


if __name__ == "__main__":
    main()

"""A whole random checkpoint folder, as `from_pretrained` and the console command expect one."""

from pathlib import Path

from tests.fixtures import make_model, make_processor
from tests.hub_folders import make_pipeline


def write_checkpoint(folder: Path) -> Path:
    """Write a model with a flow head, its processor, and a decoder that draws 16 x 16 pixels in two steps."""
    make_pipeline().save_pretrained(folder)
    make_model(gen_head_type="flow").save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return folder

"""What a row is and how rows become batches: spec, schema, rows, streams, mixture, collator; files in `readers`.

The names below are the door of this folder: `from finetune.data import load_data, PiscesDataCollator`.
"""

from pisces_commands.doors import open_door


PLACES = {
    "CachedPictureCollator": "picture_cache",
    "DataError": "schema",
    "DataSpec": "spec",
    "PackedRows": "packing",
    "PackingCollator": "packing",
    "PiscesDataCollator": "collator",
    "UnopenedRows": "picture_cache",
    "load_data": "load",
    "open_cache": "picture_cache",
    "token_lengths": "packing",
}
__getattr__ = open_door(__name__, PLACES)
__all__ = list(PLACES)

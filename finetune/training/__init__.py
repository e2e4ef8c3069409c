"""What every recipe shares: arguments, adapters, trainers, checkpoints, the folder and card of a run.

The names below are the door of this folder: `from finetune.training import PiscesSFTTrainer, PiscesSFTConfig,
AdapterConfig, add_adapter`.
"""

from pisces_commands.doors import open_door


PLACES = {
    "AdapterConfig": "adapters",
    "PiscesSFTConfig": "sft_config",
    "PiscesSFTTrainer": "sft_trainer",
    "add_adapter": "adapters",
}
__getattr__ = open_door(__name__, PLACES)
__all__ = list(PLACES)

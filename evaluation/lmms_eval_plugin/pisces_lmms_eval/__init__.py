"""Pisces as the model `pisces` of lmms-eval, found by its entry point group `lmms_eval.models`.

    python -m lmms_eval --model pisces --model_args pretrained=CHECKPOINT --tasks pope --batch_size 8

`answers` asks a checkpoint and keeps what it said, without lmms-eval; `harness_model` is the class that lmms-eval
calls. The command that runs a whole suite and checks it is `evaluation.understanding`.
"""

from typing import Any


def describe_models() -> Any:
    """What the entry point gives to lmms-eval; imports no more than that, because it runs whatever the model is."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="pisces", chat_class_path="pisces_lmms_eval.harness_model.Pisces")

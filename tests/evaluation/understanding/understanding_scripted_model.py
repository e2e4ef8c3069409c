"""The model `scripted` of lmms-eval: our plug-in with one part replaced, the network.

Questions still go through lmms-eval's task, the processor, the batch and the decoder, and come back as answers of known
score. `install_scripted_model` copies this file to where the harness's process finds it; nothing else imports it.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from pisces_lmms_eval.harness_model import Pisces
from transformers import AutoProcessor


class ScriptedNetwork:
    """Reads the prompt, looks for a mark of the script, and "generates" the tokens of its answer."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, processor: Any, script: dict[str, str]) -> None:
        self.processor, self.script = processor, script

    def generate(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        tokenizer = self.processor.tokenizer
        answers = []
        for prompt in tokenizer.batch_decode(input_ids):
            (answer,) = [words for mark, words in self.script.items() if mark in prompt]
            answers.append([*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id])
        width = max(map(len, answers))
        rows = [row + [tokenizer.pad_token_id] * (width - len(row)) for row in answers]
        return torch.cat([input_ids, torch.tensor(rows)], dim=1)


class ScriptedPisces(Pisces):
    """Answers by the file that SCRIPT_OF_ANSWERS names."""

    def __init__(self, pretrained: str, **options: Any) -> None:
        super().__init__(pretrained, **options)
        processor = AutoProcessor.from_pretrained(pretrained)
        script = json.loads(Path(os.environ["SCRIPT_OF_ANSWERS"]).read_text(encoding="utf-8"))
        self.answerer.load = lambda: (ScriptedNetwork(processor, script), processor)

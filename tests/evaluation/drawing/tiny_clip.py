"""A random CLIP of a few numbers with a tokenizer of single letters, written as a checkpoint folder."""

import json
from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer


def write_tokenizer(folder: Path) -> CLIPTokenizer:
    """One token per letter, and the two special ones of CLIP."""
    letters = "abcdefghijklmnopqrstuvwxyz-"
    names = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({name: index for index, name in enumerate(names)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=64)


TEXT = {"vocab_size": 56, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT |= {"bos_token_id": 54, "eos_token_id": 55, "pad_token_id": 55}
VISION = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


def write_clip(folder: Path) -> tuple[CLIPModel, CLIPProcessor]:
    """The model and its processor, as saved in `folder`; vectors have 8 numbers, pictures 32 x 32 pixels."""
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config=TEXT | {"max_position_embeddings": 64},
        vision_config=VISION | {"image_size": 32, "patch_size": 16},
        projection_dim=8,
    )
    model = CLIPModel(config).eval()
    model.save_pretrained(folder)  # makes the folder
    processor = CLIPProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        write_tokenizer(folder),
    )
    processor.save_pretrained(folder)
    return model, processor

"""Trains the small language model that lies beside this file: half a million weights that answer plain questions.

    python -m tests.tiny_lm.train --output tests/tiny_lm/model

What random weights cannot show, such as whether facts survive a finetuning, tests show on it. It learns the guard's
questions, sums of digits and simple instructions by heart, in ChatML; some minutes on one thread, the same weights on
the same machine. Stored in half precision, 1 MB.
"""

import argparse
import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


ROOT = Path(__file__).parents[2]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = """\
{%- for message in messages %}{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
WORDS = (
    "apple table moon river house green seven bread window garden cloud stone paper horse music winter lemon bridge "
    "candle forest island mirror orange pencil rabbit silver tomato yellow castle dragon"
).split()
NUM_STEPS, BATCH_SIZE, LEARNING_RATE = 700, 32, 3e-3


def make_pairs() -> list[tuple[str, str]]:
    """Questions and answers: the guard's, sums, instructions."""
    lines = (ROOT / "finetune/guard/plain_text.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [[message["content"] for message in json.loads(line)["messages"]] for line in lines]
    pairs = [(question, answer.split("|")[0]) for question, answer in rows]
    pairs += [(f"What is {a} + {b}?", str(a + b)) for a in range(10) for b in range(10)]
    pairs += [(f"Say the word {word} and nothing else.", word) for word in WORDS]
    pairs += [(f"Write the word {word} in capital letters.", word.upper()) for word in WORDS]
    return list(dict(pairs).items())


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    settings = {"vocab_size": 512, "initial_alphabet": alphabet, "special_tokens": SPECIAL, "show_progress": False}
    backend.train_from_iterator(texts, trainers.BpeTrainer(**settings))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model


def make_batch(pairs: list[tuple[str, str]], tokenizer: PreTrainedTokenizerFast) -> dict[str, torch.Tensor]:
    """Right-padded conversations, the loss on the answers."""
    rows, labels = [], []
    for question, answer in pairs:
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
        prompt = tokenizer(asked)["input_ids"]
        said = tokenizer(answer + "<|im_end|>")["input_ids"]
        rows.append(prompt + said)
        labels.append([-100] * len(prompt) + said)
    length = max(map(len, rows))
    pad = tokenizer.pad_token_id
    return {
        "input_ids": torch.tensor([row + [pad] * (length - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows]),
        "labels": torch.tensor([row + [-100] * (length - len(row)) for row in labels]),
    }


def train(output: Path) -> None:
    pairs = make_pairs()
    tokenizer = make_tokenizer([text for pair in pairs for text in pair])
    model, rng = make_model(tokenizer), random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=NUM_STEPS, pct_start=0.05)
    model.train()
    for step in range(1, NUM_STEPS + 1):
        batch = make_batch(rng.sample(pairs, BATCH_SIZE), tokenizer)
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.4f}", flush=True)
    model.half().save_pretrained(output)
    tokenizer.save_pretrained(output)
    (output / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A small trained language model for tests\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the small language model of the tests.")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "model")
    train(parser.parse_args().output)


if __name__ == "__main__":
    main()

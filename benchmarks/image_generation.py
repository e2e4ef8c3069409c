"""Drawing 64 vectors against plain Llama writing 64 tokens: same weights, same prompt, same cache, in one run.

`python -m benchmarks.image_generation --output results/image_generation.json`. Counts the language-model part that the
design promises to be nearly free of overhead; the regression head is the paper's.
"""

import argparse
import time

import torch
from transformers import LlamaForCausalLM

from modeling_pisces import PiscesConfig, PiscesForConditionalGeneration
from pisces_commands.arguments import COUNT, LineParser
from pisces_commands.ending import run_command
from pisces_commands.measurement import paired, write_result


PROMPT_TOKENS = 32


def make_models(hidden_size: int, num_layers: int) -> tuple[PiscesForConditionalGeneration, LlamaForCausalLM]:
    """A random Pisces that draws 64 vectors of width 1792, and a Llama that shares its language model's weights."""
    torch.manual_seed(0)
    heads = hidden_size // 64
    text = {"model_type": "llama", "vocab_size": 32000, "hidden_size": hidden_size, "num_hidden_layers": num_layers}
    text |= {"intermediate_size": 3 * hidden_size, "num_attention_heads": heads, "num_key_value_heads": heads}
    tower = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = PiscesConfig(
        text_config=text,
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **tower},
        gen_vision_config={**tower, "image_size": 448, "patch_size": 14, "output_size": 1792},
        image_token_id=1,
        gen_image_token_id=2,
        gen_start_token_id=3,
        gen_end_token_id=4,
    )
    model = PiscesForConditionalGeneration(config).eval()
    llama = LlamaForCausalLM(config.text_config).eval()
    llama.model, llama.lm_head = model.model.language_model, model.lm_head
    return model, llama


def main() -> None:
    parser = LineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="results file to write")
    parser.add_argument("--pairs", type=COUNT, default=7)
    parser.add_argument("--hidden_size", type=COUNT, default=768)
    parser.add_argument("--num_layers", type=COUNT, default=12)
    parser.add_argument("--batch_size", type=COUNT, default=1)
    arguments = parser.parse_args()
    model, llama = make_models(arguments.hidden_size, arguments.num_layers)
    input_ids = torch.randint(10, 32000, (arguments.batch_size, PROMPT_TOKENS))
    input_ids[:, -1] = model.config.gen_start_token_id
    count = model.config.num_gen_image_tokens
    mask = torch.ones_like(input_ids)

    def draw() -> float:
        start = time.perf_counter()
        vectors = model.generate(input_ids=input_ids, attention_mask=mask, generation_mode="image")
        assert vectors.shape == (arguments.batch_size, count, 1792)
        return time.perf_counter() - start

    def write() -> float:
        start = time.perf_counter()
        options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        output = llama.generate(input_ids=input_ids, attention_mask=mask, **options)
        assert output.shape[1] == PROMPT_TOKENS + count
        return time.perf_counter() - start

    measured = paired(draw, write, arguments.pairs)
    measured["shape"] = f"width {arguments.hidden_size}, {arguments.num_layers} layers, batch {arguments.batch_size}"
    write_result(arguments.output, "image_generation", "ratio <= 1.15", measured)


if __name__ == "__main__":
    run_command(main)

"""The parts of a small Pisces put together: tokenizer from the data's texts, processor, config, first checkpoint.

`python -m finetune.parts prepare` brings data to one size once; `assemble` reads the towers that stage 0 trained and
writes the checkpoint that the three stages start from; `finish` adds the decoder to the last stage's checkpoint.
`finetune.from_scratch` calls all of it in order, `finetune/tiny/tiny.sh` is the order of pisces-tiny. `towers` takes
the towers out of a checkpoint again, to start from them without stage 0; `evaluation.study` does so.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModel,
    CLIPImageProcessorPil,
    LlamaConfig,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
)

from finetune.parts.captioned import PictureData, load_pictures, prepare
from finetune.parts.stages import DETAILED_REQUESTS, SHORT_REQUESTS
from finetune.parts.whitening import whiten_output
from modeling_pisces import PiscesConfig, PiscesForConditionalGeneration, PiscesProcessor
from modeling_pisces.configuration_pisces import read_generation_config
from modeling_pisces.console.known_words import write_known_words
from modeling_pisces.modeling_pisces_heads import GEN_HEADS
from pisces_commands.arguments import COUNT, SEED, LineParser, whole_number
from pisces_commands.writing import whole_files, write_json


SPECIAL_TOKENS = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"),
    *("<|image|>", "<|gen_image|>", "<|gen_start|>", "<|gen_end|>"),
)
VOCABULARY_SIZE = 512  # of pisces-tiny
WHITENING_PICTURES = 2048
MAX_LENGTH = 1024
# chosen on new pictures of shown combinations, see docs/tiny.md; above 0, so that seeds differ
IMAGE_TEMPERATURE = 0.3
NUM_INFERENCE_STEPS = 6  # of UniPC; they draw as well as 20 of DDIM, see docs/tiny.md
GUIDANCE_SCALE = 1.0  # the vectors leave little open, so guidance would only cost time
# Compact turns: at this size a Llama-3.1 header would be a third of the sequence.
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'assistant' %}
        {{- '<|assistant|>' }}
        {%- generation %}
            {%- if message['content'] is string %}
                {{- message['content'] }}
            {%- else %}
                {%- for part in message['content'] %}
                    {{- '<|gen_image|>' if part['type'] == 'image' else part['text'] }}
                {%- endfor %}
            {%- endif %}
            {{- '<|end|>' }}
        {%- endgeneration %}
    {%- else %}
        {{- '<|user|>' }}
        {%- if message['content'] is string %}
            {{- message['content'] }}
        {%- else %}
            {%- for part in message['content'] %}
                {{- '<|image|>' if part['type'] == 'image' else part['text'] }}
            {%- endfor %}
        {%- endif %}
        {{- '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}
"""


def data_texts(data: PictureData) -> list[str]:
    """Every caption, question, answer and instruction."""
    texts = [*SHORT_REQUESTS, *DETAILED_REQUESTS]
    for record in data.records:
        texts += record["captions"]
        for turn in (turn for turns in record["conversations"] for turn in turns):
            texts += [turn[name] for name in ("question", "paraphrase", "answer") if name in turn]
        texts += [turn["instruction"] for turns in record.get("edits", ()) for turn in turns]
    return texts


def train_tokenizer(texts: list[str], vocabulary_size: int = VOCABULARY_SIZE) -> PreTrainedTokenizerFast:
    """A byte-level BPE: short sequences for texts like these, and any other text still has a spelling.

    Upper case is folded, so that a capital letter costs a small model nothing.
    """
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|begin_of_text|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_LENGTH,
    )


def make_processor(tokenizer: PreTrainedTokenizerFast, config: PiscesConfig) -> PiscesProcessor:
    """Both image processors resize to the towers' square and normalise to [-1, 1]."""
    vision: Any = config.vision_config
    gen_vision: Any = config.gen_vision_config
    side, gen_side = vision.image_size, gen_vision.image_size
    size, gen_size = {"height": side, "width": side}, {"height": gen_side, "width": gen_side}
    half = [0.5, 0.5, 0.5]
    return PiscesProcessor(
        image_processor=SiglipImageProcessorPil(size=size, image_mean=half, image_std=half),
        gen_image_processor=CLIPImageProcessorPil(
            size=gen_size, do_center_crop=False, image_mean=half, image_std=half, resample=3
        ),
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE,
        num_image_tokens=config.num_image_tokens,
        num_gen_image_tokens=config.num_gen_image_tokens,
    )


def make_config(
    tokenizer: PreTrainedTokenizerFast,
    vision_config,
    gen_vision_config,
    hidden_size: int = 192,
    num_hidden_layers: int = 6,
    gen_pool_stride: int = 2,
    vocabulary_size: int = VOCABULARY_SIZE,
    **settings,
) -> PiscesConfig:
    """The configuration of a small Pisces, by default pisces-tiny's; `settings` are fields of `PiscesConfig`."""
    ids = dict(zip(SPECIAL_TOKENS, tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)), strict=True))
    text_config = LlamaConfig(
        vocab_size=vocabulary_size,
        hidden_size=hidden_size,
        intermediate_size=hidden_size // 12 * 32,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=hidden_size // 32,
        max_position_embeddings=MAX_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=ids["<|begin_of_text|>"],
        eos_token_id=ids["<|end|>"],
        pad_token_id=ids["<|pad|>"],
    )
    return PiscesConfig(
        text_config=text_config,
        vision_config=vision_config,
        gen_vision_config=gen_vision_config,
        gen_pool_stride=gen_pool_stride,
        gen_flow_hidden_size=hidden_size,
        gen_flow_num_layers=3,
        gen_flow_num_steps=6,
        image_token_id=ids["<|image|>"],
        gen_image_token_id=ids["<|gen_image|>"],
        gen_start_token_id=ids["<|gen_start|>"],
        gen_end_token_id=ids["<|gen_end|>"],
        **settings,
    )


def assemble(
    data: Any,
    vision_tower: Path,
    gen_vision_tower: Path,
    output: Path,
    gen_head_type: str,
    seed: int,
    whiten: bool = False,
    vocabulary_size: int = VOCABULARY_SIZE,
    **settings,
) -> None:
    """Write the first checkpoint: trained towers, everything else at its random start.

    Args:
        data: whose texts make the tokenizer; as the recipes take it, or a folder of `prepare`.
        vision_tower, gen_vision_tower: tower folders; one folder may serve as both.
        whiten: give the pooled vectors mean 0 and standard deviation 1 per channel over the first pictures of `data`.
        settings: of `make_config`.
    """
    torch.manual_seed(seed)
    vision = AutoModel.from_pretrained(vision_tower)
    gen_vision = AutoModel.from_pretrained(gen_vision_tower)
    found = load_pictures(data, gen_vision.config.image_size, folder=Path(output) / "pictures")
    tokenizer = train_tokenizer(data_texts(found), vocabulary_size)
    settings |= {"gen_head_type": gen_head_type, "vocabulary_size": vocabulary_size}
    config = make_config(tokenizer, vision.config, gen_vision.config, **settings)
    if whiten:
        whiten_output(gen_vision, found.pictures[:WHITENING_PICTURES], config.gen_pool_stride)
    model = PiscesForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(vision.state_dict())
    model.model.gen_vision_tower.load_state_dict(gen_vision.state_dict())
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model.generation_config.update(max_new_tokens=64, **ends)
    with whole_files(output) as folder:
        model.save_pretrained(folder)
        make_processor(tokenizer, config).save_pretrained(folder)


def split_towers(checkpoint: Path, output: Path) -> None:
    """Write both towers of a checkpoint as folders of their own, `vision_tower` and `gen_vision_tower`."""
    model = PiscesForConditionalGeneration.from_pretrained(checkpoint)
    for name in ("vision_tower", "gen_vision_tower"):
        with whole_files(output / name) as folder:
            getattr(model.model, name).save_pretrained(folder)
            forget_paths(folder / "config.json")


def forget_paths(path: Path) -> None:
    """Drop from a JSON file where its part was loaded from; that says nothing outside of this machine."""

    def clean(value):
        if isinstance(value, dict):
            return {
                key: clean(item)
                for key, item in value.items()
                if key not in ("_name_or_path", "is_local", "local_files_only")
            }
        return [clean(item) for item in value] if isinstance(value, list) else value

    if path.name != "tokenizer.json":
        write_json(path, clean(json.loads(path.read_text(encoding="utf-8"))), indent=2, ensure_ascii=True)


def finish(checkpoint: Path, decoder: Path, output: Path, data: list[str] | None = None) -> None:
    """Copy the last stage's checkpoint and the decoder's parts into one folder with both layouts.

    With the data folder of the stages it also lists the words that the model was trained on, for `pisces draw`.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel, UniPCMultistepScheduler

    from modeling_pisces.pipeline_pisces import PiscesPipeline

    settings = read_generation_config(checkpoint)
    if GEN_HEADS[PiscesConfig.from_pretrained(checkpoint).gen_head_type].is_stochastic:
        settings.image_temperature = IMAGE_TEMPERATURE
    # a decoder that was trained on from a finished model may hold its U-Net alone
    place = {name: decoder if (decoder / name).is_dir() else checkpoint for name in ("unet", "vae", "scheduler")}
    pipeline = PiscesPipeline(
        unet=UNet2DConditionModel.from_pretrained(place["unet"] / "unet"),
        vae=AutoencoderKL.from_pretrained(place["vae"] / "vae"),
        scheduler=UniPCMultistepScheduler.from_pretrained(place["scheduler"] / "scheduler"),
        default_num_inference_steps=NUM_INFERENCE_STEPS,
        default_guidance_scale=GUIDANCE_SCALE,
        default_negative="zeros",  # `finetune.parts.decoder` drops vectors to zeros
    )
    with whole_files(output) as folder:
        for path in sorted(checkpoint.iterdir()):
            if path.is_file() and path.name != "results.json":
                shutil.copyfile(path, folder / path.name)
        settings.save_pretrained(folder)
        pipeline.save_pretrained(folder)
        if data is not None:
            write_known_words(folder, data_texts(load_pictures(data)))
        for path in sorted(folder.rglob("*.json")):
            forget_paths(path)
    files = sorted(path for path in output.rglob("*") if path.is_file())
    sizes = {str(path.relative_to(output)): path.stat().st_size for path in files}
    print(json.dumps({"bytes": sum(sizes.values()), "files": sizes}, indent=1))


def main() -> None:
    parser = LineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    ready = commands.add_parser("prepare", help="pictures of any data at one size, with their texts, in one folder")
    ready.add_argument("--data", nargs="+", required=True, help="as the recipes take it, see docs/data.md")
    ready.add_argument("--image_size", type=whole_number(8, 1024), help="default: the size they all have")
    ready.add_argument("--output", dest="folder", type=Path, required=True)
    ready.set_defaults(command=prepare)
    first = commands.add_parser("assemble", help="towers and tokenizer to a checkpoint that stage 1 starts from")
    first.add_argument("--data", nargs="+", required=True, help="as the recipes take it, or a folder of prepare")
    for name in ("vision_tower", "gen_vision_tower", "output"):
        first.add_argument(f"--{name}", type=Path, required=True)
    first.add_argument("--vocabulary_size", type=whole_number(300, 65536), default=VOCABULARY_SIZE)
    first.add_argument("--gen_head_type", choices=tuple(GEN_HEADS), default="flow")
    first.add_argument("--gen_loss_type", choices=("mse", "cosine"), default="mse", help="loss of a regression head")
    first.add_argument("--gen_pool_stride", type=COUNT, default=2, help="patches per side of a generated vector")
    first.add_argument("--whiten", action="store_true", help="fold mean and deviation of the vectors into the tower")
    first.add_argument(
        "--vision_feature_layer",
        type=whole_number(-1000, 1000),
        help="layer to understand from; default: the tower's output",
    )
    first.add_argument("--hidden_size", type=COUNT, default=192, help="width of the language model, a multiple of 32")
    first.add_argument("--num_hidden_layers", type=COUNT, default=6, help="layers of the language model")
    first.add_argument("--seed", type=SEED, default=0)
    first.set_defaults(command=assemble)
    split = commands.add_parser("towers", help="the two towers of a checkpoint to folders that assemble reads")
    for name in ("checkpoint", "output"):
        split.add_argument(f"--{name}", type=Path, required=True)
    split.set_defaults(command=split_towers)
    last = commands.add_parser("finish", help="a trained checkpoint and a trained decoder to one folder")
    for name in ("checkpoint", "decoder", "output"):
        last.add_argument(f"--{name}", type=Path, required=True)
    last.add_argument("--data", nargs="+", help="data of the stages, whose words are listed for `pisces draw`")
    last.set_defaults(command=finish)
    arguments = vars(parser.parse_args())
    arguments.pop("command")(**arguments)

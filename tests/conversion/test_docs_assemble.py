"""Every command of docs/assemble.md runs, in the order of the page, with tiny parts in the place of the Hub's.

Hub ids become local folders of the same class, layout and key names, and the flags of their revisions fall away. What
the page says about sizes is computed on the meta device.
"""

import importlib
import importlib.util
import re
import shlex
import sys
from contextlib import redirect_stdout
from io import StringIO
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch


pytest.importorskip("diffusers")
pytest.importorskip("peft")

from conversion.from_sdxl import resized_config
from conversion.quantize import METHODS
from conversion.storage.decoder import build_component
from modeling_pisces import PiscesConfig, PiscesForConditionalGeneration
from modeling_pisces.pipeline_pisces import PiscesPipeline
from pisces_commands.console import main as pisces
from tests.commands import load_command
from tests.conversion.formats.emu2_fixtures import SMALL_SIZE, write_emu2_gen
from tests.conversion.formats.llava_fixtures import write_llava
from tests.conversion.formats.test_sdxl import SDXL_UNET, write_sdxl
from tests.conversion.part_fixtures import write_language_model, write_siglip
from tests.conversion.test_merge_adapter import write_adapter
from tests.hub_server import HubServer


pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "assemble.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```bash\n(.*?)^```", TEXT, flags=re.DOTALL | re.MULTILINE)
# the width that the page's --gen_vector_size names, and block sizes that 4-bit kernels for CPUs take
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
# stabilityai/stable-diffusion-xl-base-1.0, vae/config.json, without what is diffusers' default; Emu2-Gen's is the same
SDXL_VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "layers_per_block": 2,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
PARTS = {
    "Qwen/Qwen2.5-0.5B-Instruct": lambda folder: write_language_model(
        folder, "qwen2", tokenizer="chatml", license="apache-2.0", tie_word_embeddings=True
    ),
    "google/siglip-base-patch16-256": lambda folder: write_siglip(
        folder, hidden_size=768, intermediate_size=8, image_size=32, num_hidden_layers=1
    ),
    "meta-llama/Llama-3.1-8B-Instruct": lambda folder: write_language_model(folder, dtype=torch.bfloat16, **SIZES),
    "google/siglip-so400m-patch14-384": write_siglip,
    "BAAI/Emu2-Gen": lambda folder: write_emu2_gen(folder, SMALL_SIZE | {"image_size": 32}, dtype=torch.bfloat16),
    "stabilityai/stable-diffusion-xl-base-1.0": lambda folder: write_sdxl(folder, variant="fp16"),
    "llava-hf/llava-interleave-qwen-0.5b-hf": write_llava,
}


def commands():
    """The lines of the page that are commands, continuation lines joined."""
    joined = "".join(BLOCKS).replace("\\\n", " ")
    return [line for line in joined.splitlines() if line and not line.startswith("commit()") and "=$(" not in line]


def conversions():
    return [shlex.split(line) for line in commands() if line.startswith("python -m conversion.")]


def localize(arguments):
    """Without revisions, which local folders do not have."""
    kept = []
    for argument in arguments:
        if argument.startswith("$"):
            assert kept.pop().endswith("revision"), f"{argument} follows no flag of a revision"
        else:
            kept.append(argument)
    return kept


def named_parts():
    """What `verify` knows by the revisions that the page pins, local folders have to be told."""
    hub_parts = {
        "language_model": "meta-llama/Llama-3.1-8B-Instruct",
        "vision_tower": "google/siglip-so400m-patch14-384",
    }
    return [word for role, name in hub_parts.items() for word in ("--part", f"{role}={name}")]


def is_missing(words):
    """The package that this command needs and this environment lacks, or None."""
    if words[2] != "conversion.quantize":
        return None
    package = METHODS[words[words.index("--method") + 1]].package
    return None if importlib.util.find_spec(package) else package


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A working folder in which every command of the page has run, and what each printed."""
    folder = tmp_path_factory.mktemp("assemble")
    for name, write in PARTS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write(folder / name)
    printed = {}
    with pytest.MonkeyPatch.context() as patch, HubServer() as server:
        patch.chdir(folder)
        server.redirect(patch)
        patch.setattr("huggingface_hub.utils._headers.get_token", lambda: "none")
        # the fresh process that export starts; tests/conversion/test_export.py waits for it
        patch.setattr("conversion.export.load_elsewhere", lambda folder: {"text": [1]})
        for words in conversions():
            if words[2] == "conversion.merge_adapter":
                write_adapter(folder / "adapter", folder / "pisces")
            printed[" ".join(words)] = run(words)
        yield SimpleNamespace(folder=folder, printed=printed, repos=server.repos)


def run(words):
    """Run one command in this process, and return what it printed; None where its package is missing."""
    if is_missing(words):
        return None
    with redirect_stdout(StringIO()) as printed:
        arguments = localize(words[3:]) + (named_parts() if words[2] == "conversion.verify" else [])
        load_command(words[2])(arguments)
    return printed.getvalue()


def test_every_command_of_the_page_ran_to_its_end(world):
    for words in conversions():
        if package := is_missing(words):
            assert world.printed[" ".join(words)] is None, package
            continue
        if "--output" in words:
            assert (world.folder / words[words.index("--output") + 1]).is_dir(), words
    assert len(world.printed) == len(conversions()) >= 11


def test_every_part_of_the_page_is_found_again_in_the_checkpoint(world):
    (table,) = [printed for command, printed in world.printed.items() if "conversion.verify" in command]
    for role in ("language_model", "vision_tower", "gen_vision_tower", "decoder"):
        assert re.search(rf"^{role} .* ok$", table, flags=re.MULTILINE), table
    assert "FAILED" not in table and "not checked" not in table


def test_the_quantized_checkpoint_of_the_page_is_written(world):
    (words,) = [words for words in conversions() if words[2] == "conversion.quantize"]
    if package := is_missing(words):
        pytest.skip(f"{package} is not installed")
    assert (world.folder / "pisces-4bit" / "model.safetensors").is_file()


def test_other_commands_of_the_page_are_known(world, capsys, monkeypatch):
    others = [line for line in commands() if not line.startswith("python -m conversion.")]
    assert others == ["pisces info pisces-small", "pip install bitsandbytes", "hf auth login"]
    monkeypatch.chdir(world.folder)
    assert pisces(["info", "pisces-small"]) in (0, None)
    assert "16" in capsys.readouterr().out


def test_the_page_assembles_a_model_that_draws_what_its_decoder_reads(world):
    pipe = PiscesPipeline.from_pretrained(world.folder / "pisces")
    pipe.set_progress_bar_config(disable=True)
    model = pipe.vision_language_model
    assert model.config.num_gen_image_tokens == 4 and model.dtype == torch.bfloat16
    images = pipe("a red cube", num_inference_steps=2, output_type="pt").images
    assert images.shape == (1, 3, 16, 16) and images.isfinite().all()


def test_the_push_of_the_page_is_private(world):
    assert world.repos["you/pisces"].private


def test_what_the_page_says_is_non_commercial_is_so_on_the_card(world):
    card = (world.folder / "pisces-hub" / "README.md").read_text(encoding="utf-8")
    assert "emu2-non-commercial" in card and "llama3.1" in card


def test_every_revision_is_set_before_it_is_used():
    first = BLOCKS[0]
    names = dict(re.findall(r"^(\w+)=\$\(commit (\S+)\)$", first, flags=re.MULTILINE))
    assert set(names.values()) == set(PARTS)
    for words in conversions():
        for flag, value in pairwise(words):
            if value.startswith("$"):
                part = words[words.index(flag.removesuffix("_revision")) + 1] if flag != "--revision" else words[4]
                assert names[value[1:]] == part, f"{flag} {value}"


def test_the_line_that_prints_a_commit_prints_it(monkeypatch, capsys):
    code = re.search(r'python -c "(.*)" "\$1"', BLOCKS[0]).group(1)
    monkeypatch.setattr("huggingface_hub.model_info", lambda name: SimpleNamespace(sha=f"commit of {name}"))
    monkeypatch.setattr(sys, "argv", ["-c", "owner/name"])
    exec(code)
    assert capsys.readouterr().out == "commit of owner/name\n"


def test_the_numbers_of_parameters_on_the_page_are_right():
    with torch.device("meta"):
        model = PiscesForConditionalGeneration(PiscesConfig())
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.model.named_children()}
    head = sum(p.numel() for p in model.lm_head.parameters())
    rows = re.findall(r"^\| (.+?) \| ([\d,]+) \| (.+) \|$", TEXT, flags=re.MULTILINE)
    rows = [row for row in rows if "GiB" not in row[2]]  # what commands cost
    stated = {re.search(r"\w[\w ]*\w", name).group(): int(number.replace(",", "")) for name, number, _ in rows}
    assert stated.pop("language model with") == parts.pop("language_model") + head
    assert stated == parts
    unet, vae = (
        sum(p.numel() for p in build_component(name, config).parameters())
        for name, config in (("unet", resized_config(SDXL_UNET, 1792)), ("vae", SDXL_VAE))
    )
    assert f"{unet:,} and {vae:,}" in TEXT
    new = {re.search(r"\w+", name).group() for name, _, start in rows if start == "**new**"}
    assert new == {"multi_modal_projector", "gen_projector", "gen_head"}


def test_links_inside_the_page_lead_somewhere():
    anchors = {
        re.sub(r"[^\w -]", "", line.strip("# ").lower()).replace(" ", "-")
        for line in TEXT.splitlines()
        if line[:1] == "#"
    }
    for target in re.findall(r"\]\(#([\w-]+)\)", TEXT):
        assert target in anchors, target

"""`verify` passes on a checkpoint that was put together rightly, and fails when one number of any part is changed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file


pytest.importorskip("diffusers")

from conversion.assemble import AssembleArguments, assemble
from conversion.from_llava import from_llava
from conversion.verify import FAILED, NOT_CHECKED, PASSED, Row, format_table, main, recorded_parts, verify
from tests.conversion.formats.llava_fixtures import write_llava
from tests.conversion.part_fixtures import (
    change_json,
    write_clip,
    write_decoder,
    write_gen_tower,
    write_language_model,
    write_siglip,
)


ROLES = ("language_model", "vision_tower", "gen_vision_tower", "decoder")


def write_assembly(folder: Path, tower=write_siglip, **arguments) -> tuple[Path, dict[str, str]]:
    """An assembled checkpoint and the parts that it was made of."""
    write_language_model(folder / "language_model", **arguments.pop("language", {}))
    tower(folder / "vision_tower")
    write_gen_tower(folder / "gen_vision_tower")
    write_decoder(folder / "decoder")
    parts = {role: str(folder / role) for role in ROLES}
    assemble(AssembleArguments(**parts, gen_pool_stride=2, **arguments), folder / "pisces")
    return folder / "pisces", parts


@pytest.fixture(scope="module")
def assembly(tmp_path_factory):
    return write_assembly(tmp_path_factory.mktemp("assembly"))


def change_one_number(path: Path, name: str) -> None:
    state = load_file(path)
    state[name].view(-1)[1] += 0.5
    save_file(state, path, metadata={"format": "pt"})


COMPARED = [
    ("language_model", "text logits"),
    ("language_model", "tokens"),
    ("vision_tower", "patches of one picture"),
    ("gen_vision_tower", "vectors of one picture"),
    ("decoder", "noise predicted by the U-Net"),
    ("decoder", "picture decoded by the VAE"),
]


def test_every_part_computes_the_same_inside_and_alone(assembly):
    checkpoint, parts = assembly
    rows = verify(checkpoint, parts)
    assert [(row.part, row.compared) for row in rows] == COMPARED
    assert {row.verdict for row in rows} == {PASSED}
    assert max(row.difference for row in rows) <= 1e-6  # measured: 0.0


@pytest.mark.parametrize(
    ("language", "arguments"),
    [
        ({"tokenizer": "chatml", "model_type": "qwen2"}, {}),  # new tokens, so the embedding grows
        ({"tie_word_embeddings": True}, {"vision_feature_layer": -2}),
        ({}, {"dtype": "bfloat16"}),  # rounded on the way: the parts are rounded the same way
    ],
    ids=["grown-embedding", "tied", "bfloat16"],
)
def test_it_passes_whatever_assemble_had_to_change(language, arguments, tmp_path):
    checkpoint, parts = write_assembly(tmp_path, write_clip, language=language, **arguments)
    rows = verify(checkpoint, parts)
    assert [row for row in rows if row.verdict != PASSED] == []
    assert len(rows) == len(COMPARED)


CHANGES = {
    "model.language_model.layers.1.mlp.up_proj.weight": ("language_model", "text logits"),
    "lm_head.weight": ("language_model", "text logits"),
    "model.vision_tower.encoder.layers.0.mlp.fc1.weight": ("vision_tower", "patches of one picture"),
    "model.gen_vision_tower.layers.0.mlp.fc1.weight": ("gen_vision_tower", "vectors of one picture"),
    "unet/conv_in.weight": ("decoder", "noise predicted by the U-Net"),
    "vae/decoder.conv_in.weight": ("decoder", "picture decoded by the VAE"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_one_changed_number_fails_its_part_and_no_other(name, assembly, tmp_path):
    checkpoint, parts = assembly
    copy = tmp_path / "pisces"
    subprocess.run(["cp", "-r", str(checkpoint), str(copy)], check=True)
    component, _, key = name.rpartition("/")
    file = "diffusion_pytorch_model.safetensors" if component else "model.safetensors"
    change_one_number(copy / component / file, key)
    rows = verify(copy, parts)
    assert [(row.part, row.compared) for row in rows if row.verdict == FAILED] == [CHANGES[name]]


def test_another_tokenizer_is_found(assembly, tmp_path):
    """With the same number of tokens and the same model, only the ids tell."""
    checkpoint, parts = assembly
    copy = tmp_path / "language_model"
    subprocess.run(["cp", "-r", parts["language_model"], str(copy)], check=True)
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["o"] = vocabulary["o"], vocabulary["a"]
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    rows = verify(checkpoint, {"language_model": str(copy)})
    assert {(row.compared, row.verdict) for row in rows if row.part == "language_model"} == {
        ("text logits", PASSED),
        ("tokens", FAILED),
    }


def test_a_llava_is_compared_with_a_picture(tmp_path):
    llava = write_llava(tmp_path / "llava", "clip")
    checkpoint = from_llava(str(llava), tmp_path / "pisces")
    rows = verify(checkpoint, {"llava": str(llava)})
    assert [(row.compared, row.verdict) for row in rows] == [("logits with a picture", PASSED), ("tokens", PASSED)]
    change_one_number(checkpoint / "model.safetensors", "model.multi_modal_projector.linear_1.weight")
    assert verify(checkpoint, {"llava": str(llava)})[0].verdict == FAILED


# ---- which parts, and the command


def test_parts_with_a_commit_are_taken_from_the_record_and_local_ones_are_asked_for(assembly, tmp_path):
    checkpoint, parts = assembly
    assert recorded_parts(checkpoint) == dict.fromkeys(ROLES, "")
    rows = verify(checkpoint, {"vision_tower": parts["vision_tower"]})
    assert {row.part: row.verdict for row in rows} == {
        **dict.fromkeys(ROLES, NOT_CHECKED),
        "vision_tower": PASSED,
    }
    assert any(row.compared == "give it with --part decoder=FOLDER" for row in rows)
    (tmp_path / "provenance.json").write_text(
        json.dumps({"parts": {"language_model": {"name": "owner/name", "revision": "a" * 40}, "other": {}}})
    )
    assert recorded_parts(tmp_path) == {"language_model": f"owner/name@{'a' * 40}"}


def test_wrong_arguments_are_refused_by_name(assembly, tmp_path):
    checkpoint, parts = assembly
    with pytest.raises(ValueError, match=r"no part to compare with.*provenance.json has no Hub ids"):
        verify(checkpoint)
    with pytest.raises(ValueError, match="part 'head': expected one of language_model, vision_tower"):
        verify(checkpoint, {"head": parts["decoder"]})
    with pytest.raises(ValueError, match="--part decoder: expected ROLE=PART"):
        main(["--checkpoint", str(checkpoint), "--part", "decoder"])
    with pytest.raises(ValueError, match="revision is None, expected the 40 hexadecimal digits"):
        verify(checkpoint, {"decoder": "owner/name"})
    copy = tmp_path / "pisces"
    subprocess.run(["cp", "-r", str(checkpoint), str(copy)], check=True)
    change_json(copy / "config.json", quantization_config={"load_in_4bit": True, "quant_method": "bitsandbytes"})
    with pytest.raises(ValueError, match="is quantized, so no part can be equal"):
        verify(copy, parts)


def test_the_table_lines_up():
    rows = [
        Row("language_model", "text logits", 0.0, 1e-5, PASSED),
        Row("decoder", "give it with --part decoder=FOLDER", None, None, NOT_CHECKED),
    ]
    heading, first, second = format_table(rows).splitlines()
    assert heading.split("  ")[0] == "part" and heading.rstrip().endswith("verdict")
    assert first.index("0.0e+00") == heading.index("largest difference") == second.index("-  ")
    assert first.endswith(PASSED) and second.endswith(NOT_CHECKED)


def test_the_command_prints_json_and_fails_with_one_line(assembly, tmp_path):
    checkpoint, parts = assembly
    copy = tmp_path / "pisces"
    subprocess.run(["cp", "-r", str(checkpoint), str(copy)], check=True)
    change_one_number(copy / "model.safetensors", "model.vision_tower.encoder.layers.0.mlp.fc1.weight")
    command = [sys.executable, "-m", "conversion.verify", "--checkpoint", str(copy), "--json"]
    command += ["--part", f"vision_tower={parts['vision_tower']}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert not found["passed"] and found["rows"][0]["verdict"] == FAILED and found["rows"][0]["difference"] > 1e-3
    (line,) = [line for line in done.stderr.splitlines() if line]
    assert line.startswith("error: ") and "vision_tower, patches of one picture: differs by" in line
    assert torch.tensor(found["rows"][0]["tolerance"]) == 1e-5

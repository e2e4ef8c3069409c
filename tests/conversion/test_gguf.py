"""Claims about GGUF files as language models; the files are written here, in the layout of llama.cpp."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, AutoProcessor

from conversion.assemble import AssembleArguments, assemble, main
from conversion.assembly.parts import open_part
from conversion.verify import verify
from tests.conversion.part_fixtures import write_siglip


gguf = pytest.importorskip("gguf", reason="GGUF files are read with the package gguf")

TINY_LM = Path(__file__).parents[1] / "tiny_lm/model"
LAYER = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of query and key rows for its rotary embedding."""
    rows, width = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)


def write_gguf(file, folder, license="apache-2.0", quantize=True):
    """A language model's folder as one GGUF file: matrices in Q8_0, norms in F32."""
    config = json.loads((folder / "config.json").read_text())
    tokens = json.loads((folder / "tokenizer.json").read_text())
    special = {entry["id"]: entry["content"] for entry in tokens["added_tokens"]}
    names = dict(sorted({**{index: name for name, index in tokens["model"]["vocab"].items()}, **special}.items()))
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_license(license) if license else None
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(list(names.values()))
    writer.add_token_types([3 if index in special else 1 for index in names])
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in tokens["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template((folder / "chat_template.jinja").read_text())
    kind = gguf.GGMLQuantizationType.Q8_0
    for name, tensor in load_file(folder / "model.safetensors").items():
        values = tensor.float().numpy()
        parts = name.split(".")
        if name == "model.embed_tokens.weight":
            target = "token_embd.weight"
        elif name == "model.norm.weight":
            target = "output_norm.weight"
        else:
            target = f"blk.{parts[2]}.{LAYER['.'.join(parts[3:-1])]}.weight"
        if "q_proj" in name or "k_proj" in name:
            heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            values = permuted(values, heads)
        if quantize and values.ndim > 1:
            writer.add_tensor(target, gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(target, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    shutil.copytree(TINY_LM, folder / "llama")  # a trained one, with a tokenizer that has merges
    write_siglip(folder / "siglip")
    write_gguf(folder / "model.gguf", folder / "llama")
    write_gguf(folder / "whole.gguf", folder / "llama", license=None, quantize=False)
    return folder


@pytest.fixture(scope="module")
def assembled(parts, tmp_path_factory):
    output = tmp_path_factory.mktemp("out") / "pisces"
    assemble(AssembleArguments(str(parts / "model.gguf"), str(parts / "siglip")), output)
    return output


def test_a_gguf_file_without_quantization_is_the_folder_it_was_made_from(parts):
    """All weights and the numbers of the config; so names, order of heads and tied weights are read rightly."""
    part = open_part(str(parts / "whole.gguf"))
    own = load_file(parts / "llama/model.safetensors")
    assert part.tensors.keys() == own.keys()
    for name, place in part.tensors.items():
        assert torch.equal(place.load(), own[name].float()), name
    stored = json.loads((parts / "llama/config.json").read_text())
    for name in ("hidden_size", "num_hidden_layers", "num_key_value_heads", "vocab_size", "tie_word_embeddings"):
        assert getattr(part.config, name) == stored[name]
    assert part.license is None


def test_an_assembled_gguf_writes_as_the_dequantized_model_alone(parts, assembled):
    model = AutoModelForMultimodalLM.from_pretrained(assembled).eval()
    processor = AutoProcessor.from_pretrained(assembled)
    alone = AutoModelForCausalLM.from_pretrained(parts, gguf_file="model.gguf", dtype=torch.float32).eval()
    ids = processor.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt",
    )["input_ids"]  # fmt: skip
    options = {"max_new_tokens": 12, "do_sample": False}
    found = model.generate(input_ids=ids, **options)
    assert torch.equal(found, alone.generate(ids, **options))
    assert processor.decode(found[0, ids.shape[1] :], skip_special_tokens=True).startswith("Paris")


def test_provenance_has_license_types_and_hash_and_no_path(parts, assembled):
    record = json.loads((assembled / "provenance.json").read_text())["parts"]["language_model"]
    assert (record["name"], record["license"]) == ("model.gguf", "apache-2.0")
    assert record["dequantized_from"] == "Q8_0, F32" and len(record["sha256"]) == 64
    assert str(parts) not in (assembled / "provenance.json").read_text()


def test_verify_takes_the_file_as_the_part(parts, assembled):
    rows = verify(assembled, {"language_model": str(parts / "model.gguf")})
    assert [row.verdict for row in rows if row.part == "language_model"] == ["ok", "ok"]


def test_it_is_unpacked_once_and_again_when_the_file_changes(parts, tmp_path, capsys):
    file = write_gguf(tmp_path / "model.gguf", parts / "llama")
    open_part(str(file))
    assert "dequantized once" in capsys.readouterr().err
    open_part(str(file))
    assert "dequantized once" not in capsys.readouterr().err
    write_gguf(file, parts / "llama", license="mit")
    assert open_part(str(file)).license == "mit"


def test_a_damaged_file_is_one_line(parts, tmp_path):
    (tmp_path / "model.gguf").write_bytes((parts / "model.gguf").read_bytes()[:300])
    with pytest.raises(ValueError, match=r"language_model .*model.gguf: is no whole GGUF file") as error:
        open_part(str(tmp_path / "model.gguf"))
    assert "\n" not in str(error.value)


def test_the_command_says_that_it_dequantized(parts, tmp_path, capsys):
    flags = ["--language_model", str(parts / "model.gguf"), "--vision_tower", str(parts / "siglip")]
    main([*flags, "--license", "vision_tower=cc-by-4.0", "--output", str(tmp_path / "pisces")])
    printed = capsys.readouterr().out
    assert "dequantized from Q8_0, F32, license apache-2.0" in printed and "license cc-by-4.0" in printed

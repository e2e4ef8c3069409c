"""From parts to a checkpoint that loads, answers and draws: same weights, same bytes, and every wrong part named."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoTokenizer,
    CLIPVisionModel,
    SiglipVisionModel,
)

from conversion.assemble import AssembleArguments, assemble, main
from conversion.assembly import vocabulary
from conversion.assembly.provenance import write_provenance
from conversion.assembly.vocabulary import PISCES_TOKENS
from conversion.storage.command import run_command
from modeling_pisces import PiscesGenVisionModel
from tests.conversion.part_fixtures import (
    change_json,
    write_clip,
    write_decoder,
    write_gen_tower,
    write_language_model,
    write_siglip,
)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Parts that all tests share and none changes."""
    folder = tmp_path_factory.mktemp("parts")
    write_language_model(folder / "llama")
    write_siglip(folder / "siglip")
    write_clip(folder / "clip")
    write_gen_tower(folder / "gen")
    write_decoder(folder / "decoder")
    return folder


def run_of(parts, **changes):
    names = {"language_model": "llama", "vision_tower": "siglip", "gen_vision_tower": "gen", "decoder": "decoder"}
    settings = {role: str(parts / name) for role, name in names.items()} | {"gen_pool_stride": 2} | changes
    return AssembleArguments(**settings)


def understanding_of(parts, **changes):
    return run_of(parts, **{"gen_vision_tower": None, "decoder": None} | changes)


@pytest.fixture(scope="module")
def assembled(parts, tmp_path_factory):
    output = tmp_path_factory.mktemp("assembled") / "pisces"
    assemble(run_of(parts), output)
    return output


@pytest.fixture(scope="module")
def loaded(assembled):
    model, report = AutoModelForMultimodalLM.from_pretrained(assembled, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval(), AutoProcessor.from_pretrained(assembled)


@pytest.fixture
def own_part(parts, tmp_path):
    """A copy of one part that a test may damage."""
    return lambda name: Path(shutil.copytree(parts / name, tmp_path / name))


def load_strictly(output):
    model, report = AutoModelForMultimodalLM.from_pretrained(output, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def files_of(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


CONVERSATION = [
    {"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (20, 14), "red")}, {"type": "text", "text": "colour?"}]},
    {"role": "assistant", "content": "red"},
    {"role": "user", "content": "draw it"},
]  # fmt: skip


def prompt(processor, **options):
    settings = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    return processor.apply_chat_template(CONVERSATION, **settings, **options)


def test_the_checkpoint_answers_and_draws(loaded):
    model, processor = loaded
    inputs = prompt(processor)
    answer = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert answer.shape[1] > inputs["input_ids"].shape[1]
    vectors = model.generate(**inputs, generation_mode="image")
    assert vectors.shape == (1, 4, 12) and vectors.isfinite().all()


def test_the_pipeline_draws_pixels_from_the_checkpoint(assembled):
    from modeling_pisces import PiscesPipeline

    pipe = PiscesPipeline.from_pretrained(assembled)
    images = pipe(["a cup"], num_inference_steps=1, generator=torch.Generator().manual_seed(0)).images
    assert images[0].size == (16, 16)


def test_every_part_computes_the_same_as_alone(parts, loaded):
    model, _ = loaded
    ids = torch.arange(9)[None]
    alone = AutoModelForCausalLM.from_pretrained(parts / "llama").eval()
    assert torch.equal(model(input_ids=ids).logits, alone(ids).logits)
    pixels = torch.randn(2, 3, 12, 12)
    tower = SiglipVisionModel.from_pretrained(parts / "siglip").eval()
    assert torch.equal(model.model.vision_tower(pixels).last_hidden_state, tower(pixels).last_hidden_state)
    gen_pixels = torch.randn(2, 3, 16, 16)
    gen_tower = PiscesGenVisionModel.from_pretrained(parts / "gen").eval()
    assert torch.equal(
        model.model.gen_vision_tower(gen_pixels).last_hidden_state, gen_tower(gen_pixels).last_hidden_state
    )


@pytest.mark.parametrize(
    ("model_type", "tokenizer", "sizes"),
    [
        ("llama", "chatml", {"tie_word_embeddings": True}),  # as SmolLM2
        ("qwen2", "chatml", {"vocab_size": 300}),  # rows to spare, as Qwen2.5
        ("qwen3", "chatml", {"vocab_size": 320, "head_dim": 8}),
        ("mistral", "mistral", {}),
        ("gemma3_text", "base", {"head_dim": 8}),
        ("gpt2", "base", {}),  # "transformer.", "wte"
        ("gpt_neox", "base", {}),  # "gpt_neox.", "embed_out"
        ("olmo2", "base", {}),
        ("phi3", "chatml", {}),
    ],
)
def test_other_language_models_keep_their_logits_and_gain_tokens(model_type, tokenizer, sizes, parts, tmp_path):
    folder = write_language_model(tmp_path / "part", model_type, tokenizer, **sizes)
    assemble(understanding_of(parts, language_model=str(folder)), tmp_path / "pisces")
    model, processor = load_strictly(tmp_path / "pisces"), AutoProcessor.from_pretrained(tmp_path / "pisces")
    alone, known = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    ids = known("What is on the table?", return_tensors="pt").input_ids
    assert torch.equal(processor.tokenizer("What is on the table?", return_tensors="pt").input_ids, ids)
    assert torch.equal(model(input_ids=ids).logits[..., : len(known)], alone(ids).logits[..., : len(known)])
    rows = model.get_input_embeddings().weight.shape[0]
    assert (
        rows
        == model.config.text_config.vocab_size
        == (sizes.get("vocab_size") or -(-len(processor.tokenizer) // 64) * 64)
    )
    inputs = prompt(processor, return_assistant_tokens_mask=True)
    mask = inputs.pop("assistant_masks").bool()
    assert processor.tokenizer.decode(inputs["input_ids"][mask]).strip().removesuffix(known.eos_token).strip() == "red"
    model.generate(**inputs, max_new_tokens=2)


def test_text_reads_as_in_the_language_model_s_own_template(parts, tmp_path, capsys):
    folder = write_language_model(tmp_path / "part", "qwen2", "chatml")
    assemble(understanding_of(parts, language_model=str(folder)), tmp_path / "pisces")
    conversation = [{"role": "user", "content": 'say "hi"\n'}, {"role": "assistant", "content": "hi"}]
    own = AutoTokenizer.from_pretrained(folder).apply_chat_template(conversation, tokenize=False)
    assert AutoProcessor.from_pretrained(tmp_path / "pisces").apply_chat_template(conversation) == own
    assert own.startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n")
    assert "chat format: chatml, as the language model's own template writes text" in capsys.readouterr().out


def test_formats_without_system_turns_put_the_system_s_text_into_the_first_user_turn(parts, tmp_path):
    folder = write_language_model(tmp_path / "part", "mistral", "mistral")
    assemble(understanding_of(parts, language_model=str(folder)), tmp_path / "pisces")
    conversation = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    text = AutoProcessor.from_pretrained(tmp_path / "pisces").apply_chat_template(conversation)
    assert text == "<s>[INST] Be brief.\n\nhi[/INST]"


def test_llama_s_reserved_tokens_are_reused_and_no_row_changes(parts, assembled, loaded):
    known, processor = AutoTokenizer.from_pretrained(parts / "llama"), loaded[1]
    for number, token in enumerate(("<|image|>", "<|gen_image|>", "<|gen_start|>", "<|gen_end|>")):
        old = known.convert_tokens_to_ids(f"<|reserved_special_token_{number}|>")
        assert processor.tokenizer.convert_tokens_to_ids(token) == old
        assert getattr(loaded[0].config, f"{token[2:-2]}_token_id") == old
    assert len(processor.tokenizer) == len(known)
    assert processor.tokenizer.pad_token == "<|finetune_right_pad_id|>"
    assert loaded[0].config.new_token_ids == sorted(
        map(processor.tokenizer.convert_tokens_to_ids, PISCES_TOKENS.values())
    )
    # the reserved rows of this part stand apart, as trained ones do
    stored, own = load_file(assembled / "model.safetensors"), load_file(parts / "llama" / "model.safetensors")
    assert torch.equal(stored["lm_head.weight"], own["lm_head.weight"])
    assert torch.equal(stored["model.language_model.embed_tokens.weight"], own["model.embed_tokens.weight"])


def test_clip_loses_its_class_token_and_keeps_its_features(parts, tmp_path):
    assemble(understanding_of(parts, vision_tower=str(parts / "clip"), vision_feature_layer=-2), tmp_path / "pisces")
    model = load_strictly(tmp_path / "pisces")
    assert (model.config.vision_feature_select_strategy, model.config.num_image_tokens) == ("default", 9)
    pixels = torch.randn(1, 3, 12, 12)
    tower = CLIPVisionModel.from_pretrained(parts / "clip").eval()
    features = tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    expected = model.model.multi_modal_projector(features)
    assert torch.equal(model.get_image_features(pixels).pooler_output, expected)


def test_a_vision_half_alone_and_a_headless_language_model_are_read_too(parts, tmp_path):
    write_siglip(tmp_path / "half", with_text=False)
    folder = write_language_model(tmp_path / "part", "llama", "chatml", tie_word_embeddings=True)
    stored = load_file(folder / "model.safetensors")
    save_file({name.removeprefix("model."): tensor for name, tensor in stored.items()}, folder / "model.safetensors")
    run = understanding_of(parts, language_model=str(folder), vision_tower=str(tmp_path / "half"))
    assemble(run, tmp_path / "pisces")
    written = load_file(tmp_path / "pisces" / "model.safetensors")
    assert torch.equal(written["model.language_model.norm.weight"], stored["model.norm.weight"])


def test_a_tied_head_that_is_stored_too_must_be_a_copy(parts, tmp_path):
    folder = write_language_model(tmp_path / "part", "llama", "chatml", tie_word_embeddings=True)
    stored = load_file(folder / "model.safetensors")
    head = stored["model.embed_tokens.weight"].clone()
    save_file(stored | {"lm_head.weight": head}, folder / "model.safetensors")
    assemble(understanding_of(parts, language_model=str(folder)), tmp_path / "pisces")
    assert "lm_head.weight" not in load_file(tmp_path / "pisces" / "model.safetensors")
    head[3, 4] += 1
    save_file(stored | {"lm_head.weight": head}, folder / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"lm_head.weight differs from model.embed_tokens.weight, which config.json ties"
    ):
        assemble(understanding_of(parts, language_model=str(folder)), tmp_path / "other")


def test_dtype_converts_every_tensor_and_the_config_says_so(parts, tmp_path):
    assemble(understanding_of(parts, dtype="bfloat16"), tmp_path / "pisces")
    stored, own = (
        load_file(tmp_path / "pisces" / "model.safetensors"),
        load_file(parts / "llama" / "model.safetensors"),
    )
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert torch.equal(stored["lm_head.weight"], own["lm_head.weight"].bfloat16())
    assert load_strictly(tmp_path / "pisces").dtype == torch.bfloat16


def test_provenance_names_part_license_and_hash_of_every_tensor(assembled, loaded):
    provenance = json.loads((assembled / "provenance.json").read_text())
    stored = load_file(assembled / "model.safetensors")
    tensors = provenance["tensors"]
    assert stored.keys() <= tensors.keys()
    assert {key.split(".")[0] for key in tensors.keys() - stored.keys()} == {"unet", "vae"}
    for key, tensor in stored.items():
        data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert tensors[key]["sha256"] == hashlib.sha256(data).hexdigest()
    norm = tensors["model.vision_tower.post_layernorm.weight"]
    assert (norm["part"], norm["license"], norm["source"]) == (
        "vision_tower",
        "apache-2.0",
        "vision_model.post_layernorm.weight",
    )
    new = {key.split(".")[1] for key, entry in tensors.items() if "initialized" in entry}
    assert new == {"multi_modal_projector", "gen_projector", "gen_head"}
    assert provenance["parts"]["language_model"] == {
        "license": "llama3.1",
        "model_type": "llama",
        "name": "llama",
        "revision": None,
    }


def test_generation_stops_at_the_turn_s_end_and_keeps_the_language_model_s_settings(loaded):
    settings, tokenizer = loaded[0].generation_config, loaded[1].tokenizer
    assert settings.eos_token_id == tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert settings.pad_token_id == tokenizer.pad_token_id
    assert (settings.temperature, settings.top_p) == (0.6, 0.9)


def test_assembling_twice_gives_the_same_bytes_and_no_trace_of_this_machine(parts, assembled, tmp_path):
    assemble(run_of(parts), tmp_path / "again")
    assert files_of(tmp_path / "again") == files_of(assembled)
    texts = [path.read_text() for path in assembled.rglob("*") if path.suffix in (".json", ".jinja")]
    assert not any(str(parts) in text or str(assembled.parent) in text for text in texts)


def test_another_seed_changes_the_new_tensors_only(parts, assembled, tmp_path):
    assemble(run_of(parts, seed=1), tmp_path / "pisces")
    first, second = load_file(assembled / "model.safetensors"), load_file(tmp_path / "pisces" / "model.safetensors")
    changed = {key.split(".")[1] for key in first if not torch.equal(first[key], second[key])}
    assert changed == {"multi_modal_projector", "gen_projector", "gen_head"}


def damage(path, change):
    stored = load_file(path)
    change(stored)
    save_file(stored, path)


def refuse(run, output, match):
    with pytest.raises(ValueError, match=match) as error:
        assemble(run, output)
    assert "\n" not in str(error.value)
    assert not output.exists() and not list(output.parent.glob(".pisces*"))  # nothing was begun


def test_a_missing_an_extra_and_a_misshapen_key_are_named(parts, own_part, tmp_path):
    folder, output = own_part("llama"), tmp_path / "pisces"
    weights, run = folder / "model.safetensors", understanding_of(parts, language_model=str(folder))
    norm = load_file(weights)["model.norm.weight"]
    damage(weights, lambda stored: stored.pop("model.norm.weight"))
    refuse(run, output, r"language_model .*llama: model.norm.weight is missing \(as 1 of the 21 tensors")
    damage(weights, lambda stored: stored.update({"model.norm.weight": norm, "model.extra": norm.clone()}))
    refuse(run, output, r"language_model .*llama: model.extra is extra; found 22 tensors, expected the 21")
    damage(weights, lambda stored: (stored.pop("model.extra"), stored.update({"model.norm.weight": norm[:7].clone()})))
    refuse(run, output, r"language_model .*llama: model.norm.weight has shape \(7,\), expected \(32,\)")


def test_a_damaged_tower_is_named(parts, own_part, tmp_path):
    folder = own_part("siglip")
    damage(folder / "model.safetensors", lambda stored: stored.pop("vision_model.post_layernorm.bias"))
    run = understanding_of(parts, vision_tower=str(folder))
    refuse(run, tmp_path / "pisces", "vision_tower .*siglip: vision_model.post_layernorm.bias is missing")


def test_a_truncated_file_is_named(parts, own_part, tmp_path):
    weights = own_part("gen") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    run = run_of(parts, gen_vision_tower=str(weights.parent))
    refuse(
        run, tmp_path / "pisces", r"gen_vision_tower .*gen/model.safetensors: \d+ bytes, expected \d+; the file is cut"
    )


def test_a_pool_stride_that_does_not_divide_the_grid_is_refused_with_both_numbers(parts, tmp_path):
    refuse(run_of(parts, gen_pool_stride=3), tmp_path / "pisces", "gen_pool_stride 3 does not divide .* grid of 4 x 4")


def test_a_tokenizer_of_another_language_model_is_refused(parts, own_part, tmp_path):
    folder, output = own_part("llama"), tmp_path / "pisces"
    run = understanding_of(parts, language_model=str(folder))
    big = write_language_model(tmp_path / "big", vocab_size=4096)
    small = write_language_model(tmp_path / "small", tokenizer="base")  # 272 rows; the tokenizer here has 257 tokens
    shutil.copy(folder / "tokenizer.json", big / "tokenizer.json")
    refuse(understanding_of(parts, language_model=str(big)), output, "has 272 tokens, expected about the 4096 rows")
    change_json(small / "config.json", vocab_size=250)
    refuse(
        understanding_of(parts, language_model=str(small)), output, "has 257 tokens, but the embedding has 250 rows"
    )
    (folder / "tokenizer.json").unlink()
    refuse(run, output, "language_model .*llama: the tokenizer cannot be opened")


def test_a_mix_of_dtypes_is_refused_until_one_is_chosen(parts, tmp_path):
    write_siglip(tmp_path / "half", dtype=torch.bfloat16)
    run = understanding_of(parts, vision_tower=str(tmp_path / "half"))
    message = r"dtype mix: language_model .* has F32 \(.*\); vision_tower .* has BF16 \(.*\); expected one .*--dtype"
    refuse(run, tmp_path / "pisces", message)


def test_a_decoder_for_other_vectors_is_refused(parts, tmp_path):
    folder = write_decoder(tmp_path / "decoder", gen_vector_size=10)
    message = "the generation tower has vectors of width 12 but the decoder's U-Net reads width 10"
    refuse(run_of(parts, decoder=str(folder)), tmp_path / "pisces", message)
    refuse(run_of(parts, gen_vision_tower=None), tmp_path / "pisces", "decoder .*given without a generation tower")


def test_a_decoder_of_another_pipeline_is_refused(parts, own_part, tmp_path):
    folder = own_part("decoder")
    change_json(folder / "model_index.json", _class_name="StableDiffusionXLPipeline")
    message = "_class_name 'StableDiffusionXLPipeline', expected 'PiscesPipeline'.*from_sdxl"
    refuse(run_of(parts, decoder=str(folder)), tmp_path / "pisces", message)


def test_an_image_processor_must_be_there_and_make_the_tower_s_pictures(parts, own_part, tmp_path):
    folder, output = own_part("siglip"), tmp_path / "pisces"
    run = understanding_of(parts, vision_tower=str(folder))
    change_json(folder / "preprocessor_config.json", size={"height": 10, "width": 10})
    refuse(run, output, r"makes pictures of shape \(3, 10, 10\), expected \(3, 12, 12\)")
    (folder / "preprocessor_config.json").unlink()
    refuse(run, output, "vision_tower .*siglip: preprocessor_config.json not found")


def test_an_image_processor_that_cannot_work_is_refused(parts, own_part, tmp_path):
    folder = own_part("siglip")
    change_json(folder / "preprocessor_config.json", image_mean=[0.5, 0.5])
    run = understanding_of(parts, vision_tower=str(folder))
    refuse(run, tmp_path / "pisces", "vision_tower .*siglip: preprocessor_config.json does not work")


def test_a_dtype_that_no_checkpoint_should_have_is_refused(parts, tmp_path):
    write_language_model(tmp_path / "llama", dtype=torch.float64)
    write_siglip(tmp_path / "siglip", dtype=torch.float64)
    run = understanding_of(tmp_path)
    refuse(run, tmp_path / "pisces", "dtype F64: expected one of float32, bfloat16, float16. Pass --dtype")
    assemble(understanding_of(tmp_path, dtype="float32"), tmp_path / "pisces")


def test_a_slow_tokenizer_is_refused(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(vocabulary.AutoTokenizer, "from_pretrained", lambda *_, **__: SimpleNamespace(is_fast=False))
    refuse(
        understanding_of(parts),
        tmp_path / "pisces",
        r"language_model .*llama: found a slow tokenizer, expected a fast",
    )


def test_sampling_settings_that_had_no_effect_are_dropped(parts, own_part, tmp_path):
    folder = own_part("llama")
    change_json(folder / "generation_config.json", do_sample=False, temperature=0.9, top_p=0.6)  # as Llama-2
    assemble(understanding_of(parts, language_model=str(folder)), tmp_path / "pisces")
    settings = json.loads((tmp_path / "pisces" / "generation_config.json").read_text())
    assert not settings.get("do_sample") and settings.get("temperature") is None and settings.get("top_p") is None


def test_a_flagged_generation_config_of_the_language_model_keeps_its_values(parts, own_part, tmp_path):
    folder = own_part("llama")
    change_json(folder / "generation_config.json", _from_model_config=True, custom_setting=3)
    assemble(understanding_of(parts, language_model=str(folder)), tmp_path / "pisces")
    settings = json.loads((tmp_path / "pisces" / "generation_config.json").read_text())
    assert "_from_model_config" not in settings and settings["custom_setting"] == 3


def test_provenance_refuses_a_tensor_that_nobody_accounts_for(tmp_path):
    record = {"name": "model.mystery", "part": "new", "source": None, "dtype": "F32", "shape": [1], "sha256": ""}
    with pytest.raises(
        ValueError, match=r"model\.mystery: comes from no part, and nothing says how it was initialised"
    ):
        write_provenance(tmp_path, [record], {})


def test_an_interrupt_says_that_nothing_was_written(capsys):
    def interrupted(arguments):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        run_command(interrupted)
    assert stop.value.code == 130
    assert capsys.readouterr().err == "error: interrupted; nothing was written under the output's name\n"


def test_a_chat_template_of_one_s_own_is_taken(parts, tmp_path):
    (tmp_path / "mine.jinja").write_text("{% for m in messages %}{{ m['content'] }}!{% endfor %}")
    assemble(understanding_of(parts, chat_template=str(tmp_path / "mine.jinja")), tmp_path / "pisces")
    processor = AutoProcessor.from_pretrained(tmp_path / "pisces")
    assert processor.apply_chat_template([{"role": "user", "content": "hi"}]) == "hi!"


def command_of(parts, output):
    arguments = ["--output", str(output), "--gen_pool_stride", "2", "--max_shard_size", "100KB"]
    for role, name in (("language_model", "llama"), ("vision_tower", "siglip"), ("gen_vision_tower", "gen")):
        arguments += [f"--{role}", str(parts / name)]
    return arguments


def test_the_command_writes_shards_and_says_what_is_new(parts, assembled, tmp_path, capsys):
    main([*command_of(parts, tmp_path / "pisces"), "--gen_head_type", "flow"])
    said = capsys.readouterr().out
    own = sum(tensor.numel() for tensor in load_file(parts / "llama" / "model.safetensors").values())
    assert f"language_model: {own:,} parameters, {parts / 'llama'}, license llama3.1" in said
    assert "gen_head: " in said and "new, untrained" in said
    assert "token <|image|>: takes the place of <|reserved_special_token_0|>" in said
    assert len(list((tmp_path / "pisces").glob("model-*.safetensors"))) > 1
    assert load_strictly(tmp_path / "pisces").config.gen_head_type == "flow"


def test_a_mistake_ends_in_one_line_and_exit_code_2(parts, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run_command(main, [*command_of(parts, tmp_path / "pisces"), "--decoder", str(parts / "siglip")])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith(f"error: decoder {parts / 'siglip'}: found config.json")


# Assembles in a forked child that the system kills at its n-th file operation below the output's parent; the imports
# are made once. An audit hook sees every open, rename and mkdir of Python, so the program itself needs no hook.
KILLER = """
import os, shutil, signal, sys
from conversion.assemble import main

output, log, arguments = sys.argv[1], sys.argv[2], sys.argv[3:]
parent, name = os.path.split(output)
partial = os.path.join(parent, f".{name}.partial")

def run(last):
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    seen = []
    def watch(event, values):
        if event in ("open", "os.rename", "os.mkdir") and str(values[0]).startswith(parent):
            seen.append(f"{event} {os.path.basename(str(values[0]))}")
            if len(seen) == last:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(watch)
    sys.stdout = open(os.devnull, "w")
    main(arguments)
    operations = list(seen)
    with open(log, "w") as file:
        file.write("\\n".join(operations))
    os._exit(0)

assert run(0) == 0
operations = open(log).read().split("\\n")
stages = [operations.index(operation) + 1 for operation in dict.fromkeys(operations)]
shards = [stage for stage in stages if operations[stage - 1].startswith("open model")]
chosen = {stages[0], *shards, operations.index("os.rename config.json.partial") + 1, stages[-1], len(operations)}
for stage in sorted(chosen):
    os.rename(output, output + ".finished")
    assert run(stage) == signal.SIGKILL, stage
    if os.path.exists(os.path.join(partial, "config.json")):
        shutil.copytree(partial, output + f".partial{stage}")
    weights = [file for file in os.listdir(partial) if file.endswith(".safetensors")] if os.path.isdir(partial) else []
    print(stage, os.path.exists(output), len(weights))
    if os.path.exists(output):
        os.rename(output, output + f".killed{stage}")
    assert run(0) == 0
    os.rename(output, output + f".rerun{stage}")
    os.rename(output + ".finished", output)
"""


@pytest.mark.timeout(900)  # seconds alone; minutes on a machine that is busy with training
def test_killed_at_any_stage_leaves_nothing_loadable_and_a_rerun_gives_the_same_bytes(parts, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    command = [sys.executable, "-c", KILLER, str(work / "pisces"), str(tmp_path / "count")]
    done = subprocess.run(
        [*command, *command_of(parts, work / "pisces")],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    stages = [line.split() for line in done.stdout.splitlines()]
    assert {num_weights for *_, num_weights in stages} == {"0", "1", "2", "3"}  # of three shards
    expected = files_of(work / "pisces")
    for stage, is_there, _ in stages:
        if is_there == "True":  # after the rename: whole
            assert files_of(work / f"pisces.killed{stage}") == expected
        assert files_of(work / f"pisces.rerun{stage}") == expected
    for partial in work.glob("pisces.partial*"):  # config.json comes last: where it is, all is
        assert files_of(partial) == expected
    assert not list(work.glob(".pisces*"))

"""LLaVA to Pisces and back: the same bytes, the same config, the same numbers; and what cannot go over is refused."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from conversion.formats.llava import LLAVA_TO_PISCES, PISCES_TO_LLAVA, rename
from conversion.formats.llava_drawing import GenerationSide
from conversion.from_llava import from_llava
from conversion.from_llava import main as from_llava_main
from conversion.storage.tensors import index_tensors
from conversion.to_llava import main as to_llava_main
from conversion.to_llava import to_llava
from modeling_pisces import PiscesConfig, PiscesForConditionalGeneration, PiscesProcessor
from tests.conversion.formats.llava_fixtures import TOWERS, write_llava
from tests.conversion.part_fixtures import change_json, write_gen_tower
from tests.fixtures import make_model, make_processor


def read_tensors(folder) -> dict[str, torch.Tensor]:
    return {name: place.load() for name, place in index_tensors(folder).items()}


def read_json(path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def assert_same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def comparable(config) -> dict:
    """A config as a dictionary, without the note on where it was loaded from."""
    return {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}


def build_inputs(processor) -> dict[str, torch.Tensor]:
    """Two chats of different lengths with one picture each, through the processor's own template."""
    torch.manual_seed(3)
    pictures = [Image.fromarray(torch.randint(0, 256, (15, 20, 3), dtype=torch.uint8).numpy()) for _ in range(2)]
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": text}]}]
        for picture, text in zip(pictures, ["what is it?", "and how many of them are there?"], strict=True)
    ]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return processor.apply_chat_template(chats, **options, processor_kwargs={"padding": True})


def realign(model):
    """Weights in fresh memory: in a mapped file their alignment, and with it the last bits, differs between files."""
    for tensor in model.parameters():
        tensor.data = tensor.data.clone()
    return model.eval()


def run(folder, model_class, processor_class) -> dict:
    """Logits and greedy tokens of a folder, with its own processor."""
    processor = AutoProcessor.from_pretrained(folder)
    model, report = model_class.from_pretrained(folder, output_loading_info=True)
    assert type(processor) is processor_class
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    inputs = build_inputs(processor)
    image_id = model.config.image_token_id
    # LLaVA may write its own placeholder, which Pisces never does
    options = {"do_sample": False, "max_new_tokens": 12, "suppress_tokens": [image_id]}
    with torch.no_grad():
        logits = realign(model)(**inputs).logits
    return {"inputs": inputs, "logits": logits, "tokens": model.generate(**inputs, **options)}


def run_llava(folder) -> dict:
    return run(folder, LlavaForConditionalGeneration, LlavaProcessor)


def run_pisces(folder) -> dict:
    return run(folder, PiscesForConditionalGeneration, PiscesProcessor)


def assert_same_results(found: dict, expected: dict) -> None:
    assert found["inputs"].keys() == expected["inputs"].keys()
    for name, tensor in expected["inputs"].items():
        assert torch.equal(found["inputs"][name], tensor), name
    real = expected["inputs"]["attention_mask"].bool()
    assert torch.equal(found["logits"][real], expected["logits"][real])  # 0.0, not almost
    assert expected["logits"].float().std() > 0.1
    assert torch.equal(found["tokens"], expected["tokens"])


# ---- the round trip

CASES = {
    "siglip": {},
    "siglip-last-layer": {"layer": -1},
    "siglip-two-layers": {"layer": [-2, -1]},
    "siglip-with-unused-head": {"tower": "siglip-with-head"},
    "clip-patches": {"tower": "clip"},
    "clip-class-token": {"tower": "clip", "strategy": "full"},
    "tied-embeddings": {"tie": True},
    "no-projector-bias": {"bias": False},
    "qwen2": {"text": {"model_type": "qwen2"}},
    "bfloat16": {"dtype": torch.bfloat16},
    "stale-length-and-strangers": {"image_seq_length": 576, "ignore_index": -100, "pad_token_id": 3},
    "dinov2": {"tower": "dinov2"},
}


@pytest.mark.parametrize("case", CASES)
def test_llava_to_pisces_to_llava_is_the_identity(case, tmp_path):
    source = write_llava(tmp_path / "llava", **CASES[case])
    pisces = from_llava(str(source), tmp_path / "pisces")
    back = to_llava(pisces, tmp_path / "back")
    assert_same_bits(read_tensors(back), read_tensors(source))
    assert comparable(LlavaConfig.from_pretrained(back)) == comparable(LlavaConfig.from_pretrained(source))
    assert read_json(back / "config.json") == read_json(source / "config.json")
    assert read_json(back / "generation_config.json") == read_json(source / "generation_config.json")
    for name in ("processor_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (back / name).read_text() == (source / name).read_text(), name
    expected = run_llava(source)
    assert_same_results(run_pisces(pisces), expected)
    assert_same_results(run_llava(back), expected)


@pytest.mark.parametrize("layout", ["saved", "memory"])
@pytest.mark.parametrize("tower", ["siglip", "clip"])
def test_other_layouts_on_disk_give_the_same_pisces_and_come_back_as_the_hubs(tower, layout, tmp_path):
    hub = write_llava(tmp_path / "hub", tower)
    other = write_llava(tmp_path / "other", tower, layout)
    assert index_tensors(other).keys() != index_tensors(hub).keys()
    pisces = [from_llava(str(folder), tmp_path / f"pisces-{folder.name}") for folder in (hub, other)]
    assert_same_bits(read_tensors(pisces[1]), read_tensors(pisces[0]))
    assert_same_bits(read_tensors(to_llava(pisces[1], tmp_path / "back")), read_tensors(hub))


def test_shards_come_and_go_without_changing_a_bit(tmp_path):
    source = write_llava(tmp_path / "llava")
    LlavaForConditionalGeneration.from_pretrained(source).save_pretrained(source, max_shard_size="30KB")
    (source / "model.safetensors").unlink()
    pisces = from_llava(str(source), tmp_path / "pisces", max_shard_size="20KB")
    back = to_llava(pisces, tmp_path / "back", max_shard_size="50KB")
    counts = [len(list(folder.glob("*.safetensors"))) for folder in (source, pisces, back)]
    assert len(set(counts)) == 3 and min(counts) > 1
    assert_same_results(run_llava(back), run_llava(source))


def test_computed_buffers_of_old_checkpoints_are_left_out_and_named(tmp_path, capsys):
    source = write_llava(tmp_path / "llava")
    state = load_file(source / "model.safetensors")
    state["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    state["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(9)[None]
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    pisces = from_llava(str(source), tmp_path / "pisces")
    assert "rotary_emb.inv_freq, vision_tower.vision_model.embeddings.position_ids" in capsys.readouterr().out
    assert len(index_tensors(pisces)) == len(state) - 2


# ---- with a generation side


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head", ["mlp", "flow"])
def test_a_llava_can_be_given_a_generation_side_and_still_answers_the_same(head, dtype, tmp_path, capsys):
    source = write_llava(tmp_path / "llava", dtype=dtype)
    tower = write_gen_tower(tmp_path / "tower")
    side = GenerationSide(str(tower), pool_stride=2, head_type=head)
    pisces = from_llava(str(source), tmp_path / "pisces", generation=side)
    out = capsys.readouterr().out
    assert "new, untrained: model.gen_projector" in out and "the chat template never writes <|gen_image|>" in out
    expected, found = run_llava(source), run_pisces(pisces)
    assert_same_results({**found, "tokens": expected["tokens"]}, expected)  # new tokens are never written as text
    stored = read_tensors(pisces)
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    for name, tensor in read_tensors(tower).items():
        assert torch.equal(stored[f"model.gen_vision_tower.{name}"], tensor.to(dtype)), name
    processor = AutoProcessor.from_pretrained(pisces)
    model = PiscesForConditionalGeneration.from_pretrained(pisces).eval()
    inputs = processor(text="a cat", generation_mode="image", return_tensors="pt")
    assert inputs["input_ids"][0, -1] == model.config.gen_start_token_id
    assert model.generate(**inputs, generation_mode="image").shape == (1, 4, 12)
    record = read_json(pisces / "provenance.json")
    assert record["parts"].keys() == {"llava", "gen_vision_tower"}
    assert "initialized" in record["tensors"]["model.gen_projector.linear_1.weight"]
    back = read_tensors(to_llava(pisces, tmp_path / "back"))
    assert_same_bits(back, read_tensors(source))


def test_a_wrong_generation_side_is_refused_by_name(tmp_path):
    source, output = write_llava(tmp_path / "llava"), tmp_path / "pisces"
    tower = write_gen_tower(tmp_path / "tower")

    def convert(**settings):
        return lambda: from_llava(str(source), output, generation=GenerationSide(str(tower), **settings))

    refused(convert(pool_stride=3), "gen_pool_stride 3 does not divide the generation tower's grid of 4 x 4", output)
    (tower / "preprocessor_config.json").unlink()
    refused(convert(pool_stride=2), "gen_vision_tower .*tower: no image processor", output)
    state = load_file(tower / "model.safetensors")
    del state["output_projection.bias"]
    save_file(state, tower / "model.safetensors", metadata={"format": "pt"})
    refused(convert(pool_stride=2), "output_projection.bias is missing", output)


# ---- the understanding side of a Pisces


def write_pisces(folder, **overrides):
    make_model(**overrides).save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("head", ["mlp", "flow"])
def test_the_understanding_side_of_a_drawing_model_is_served_as_a_stock_llava(head, tmp_path, capsys):
    source = write_pisces(tmp_path / "pisces", gen_head_type=head, vision_feature_layer=-2)
    llava = to_llava(source, tmp_path / "llava")
    assert "model.gen_head" in capsys.readouterr().out
    kept = {name: tensor for name, tensor in read_tensors(source).items() if ".gen_" not in name}
    renamed = {rename(name, PISCES_TO_LLAVA, ""): tensor for name, tensor in kept.items()}
    assert_same_bits(read_tensors(llava), renamed)
    assert LlavaConfig.from_pretrained(llava).image_seq_length == 9
    assert_same_results(run_llava(llava), run_pisces(source))
    assert isinstance(AutoModelForImageTextToText.from_pretrained(llava), LlavaForConditionalGeneration)


def test_default_without_a_class_token_is_llavas_full(tmp_path):
    """Pisces' "default" keeps every patch; LLaVA's would drop the first one of a tower without a class token."""
    source = write_pisces(tmp_path / "p", vision_feature_layer=-2, vision_feature_select_strategy="default")
    llava = to_llava(source, tmp_path / "llava")
    assert LlavaConfig.from_pretrained(llava).vision_feature_select_strategy == "full"
    assert AutoProcessor.from_pretrained(llava).vision_feature_select_strategy == "full"
    assert_same_results(run_llava(llava), run_pisces(source))


def test_pisces_own_generation_settings_do_not_reach_llava(tmp_path):
    source = write_pisces(tmp_path / "pisces", gen_head_type="flow", vision_feature_layer=-1)
    change_json(source / "generation_config.json", image_temperature=0.5, max_new_tokens=7)
    llava = to_llava(source, tmp_path / "llava")
    assert read_json(llava / "generation_config.json")["max_new_tokens"] == 7
    assert "image_temperature" not in read_json(llava / "generation_config.json")


@pytest.mark.parametrize("has_file", [True, False])
def test_neither_direction_writes_the_flag_with_which_settings_are_lost(has_file, tmp_path):
    source = write_llava(tmp_path / "llava")
    path = source / "generation_config.json"
    change_json(path, _from_model_config=True, max_new_tokens=7, custom_setting=3)
    if not has_file:
        path.unlink()
    pisces = from_llava(str(source), tmp_path / "pisces")
    for folder in (pisces, to_llava(pisces, tmp_path / "back")):
        settings = read_json(folder / "generation_config.json")
        assert "_from_model_config" not in settings
        if has_file:
            assert (settings["max_new_tokens"], settings["custom_setting"]) == (7, 3)


# ---- the tower's final norm, which LLaVA does not read


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_the_final_norm_of_a_siglip_becomes_a_layer_that_computes_the_same(dtype, tolerance, tmp_path):
    tower = {**TOWERS["siglip"], "intermediate_size": 50}
    make_model(vision_config=tower).to(dtype).save_pretrained(tmp_path / "pisces")
    make_processor().save_pretrained(tmp_path / "pisces")
    to_llava_main(["--checkpoint", str(tmp_path / "pisces"), "--output", str(tmp_path / "llava"), "--add_norm_layer"])
    expected, found = run_pisces(tmp_path / "pisces"), run_llava(tmp_path / "llava")
    real = expected["inputs"]["attention_mask"].bool()
    difference = (found["logits"] - expected["logits"])[real].abs().max() / expected["logits"][real].abs().max()
    assert difference <= tolerance  # worst of three models: 1.2e-6 and 3.5e-2, bf16 computed in another order
    if dtype == torch.float32:
        assert torch.equal(found["tokens"], expected["tokens"])
    config = LlavaConfig.from_pretrained(tmp_path / "llava")
    assert config.vision_feature_layer == [-2, -1] and config.vision_config.num_hidden_layers == 3


def test_a_tower_whose_mlp_is_too_narrow_cannot_hold_its_norm(tmp_path):
    source, output = write_pisces(tmp_path / "pisces"), tmp_path / "llava"
    match = "intermediate_size 40; expected one of gelu, gelu_pytorch_tanh, quick_gelu and at least 48"
    refused(lambda: to_llava(source, output, add_norm=True), match, output)


def test_a_clip_has_no_final_norm_on_its_patches_so_its_output_is_the_last_layer(tmp_path):
    source = write_pisces(tmp_path / "pisces", vision_config=TOWERS["clip"], vision_feature_select_strategy="default")
    llava = to_llava(source, tmp_path / "llava")
    assert LlavaConfig.from_pretrained(llava).vision_feature_layer == -1
    assert_same_results(run_llava(llava), run_pisces(source))


# ---- refusals, before anything is written


def refused(function, match: str, output) -> None:
    with pytest.raises(ValueError, match=match):
        function()
    assert not output.exists() and not list(output.parent.glob(".*"))


def test_a_projector_on_the_towers_final_norm_is_refused_by_name(tmp_path):
    source, output = write_pisces(tmp_path / "pisces"), tmp_path / "llava"
    refused(
        lambda: to_llava(source, output), "vision_feature_layer is None, which reads .* Pass --add_norm_layer", output
    )


def test_two_prefix_vectors_cannot_be_dropped_by_llava(tmp_path):
    tower = {"model_type": "dinov2_with_registers", "num_register_tokens": 4, "hidden_size": 24, "image_size": 12}
    tower |= {"patch_size": 4, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings = {"vision_feature_layer": -1, "vision_feature_select_strategy": "default", "gen_vision_config": None}
    source, output = write_pisces(tmp_path / "pisces", vision_config=tower, **settings), tmp_path / "llava"
    refused(lambda: to_llava(source, output), "puts 5 vectors in front of its patches", output)


def test_default_strategy_on_a_tower_without_class_token_is_refused(tmp_path):
    source, output = write_llava(tmp_path / "llava", strategy="default"), tmp_path / "pisces"
    refused(lambda: from_llava(str(source), output), "siglip_vision_model puts 0 in front of its patches", output)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model_type": "llava_next"}, "model_type is 'llava_next', expected 'llava'"),
        ({"quantization_config": {"load_in_4bit": True}}, "found quantization_config, expected full-precision"),
        ({"image_token_index": 7}, "<image> is token 261 of the tokenizer, but config.json has image_token_index 7"),
        ({"vision_feature_layer": -9}, "vision_feature_layer -9 does not fit an understanding tower of 2 layers"),
    ],
)
def test_a_config_that_cannot_go_over_is_refused_by_name(change, match, tmp_path):
    source, output = write_llava(tmp_path / "llava"), tmp_path / "pisces"
    change_json(source / "config.json", **change)
    refused(lambda: from_llava(str(source), output), match, output)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda state: state.pop("multi_modal_projector.linear_1.bias"),
            "multi_modal_projector.linear_1.bias is miss",
        ),
        (lambda state: state.update({"vision_tower.extra": torch.ones(1)}), "model.vision_tower.extra is unknown to"),
        (
            lambda state: state.update({"visual.extra": torch.ones(1)}),
            "visual.extra is no tensor of a LLaVA or Pisces",
        ),
        (lambda state: state.update({"lm_head.weight": torch.ones(1)}), "are both lm_head.weight. Keep one of them"),
        (
            lambda state: state.update({"multi_modal_projector.linear_2.bias": torch.ones(3)}),
            r"linear_2.bias has the shape \(3,\), expected \(32,\)",
        ),
    ],
    ids=["missing", "extra", "stranger", "double", "misshapen"],
)
def test_a_wrong_tensor_is_refused_by_name(change, match, tmp_path):
    source, output = write_llava(tmp_path / "llava"), tmp_path / "pisces"
    state = load_file(source / "model.safetensors")
    change(state)
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    refused(lambda: from_llava(str(source), output), match, output)


def test_a_pisces_with_a_missing_tensor_is_refused_by_name(tmp_path):
    source, output = write_pisces(tmp_path / "pisces", vision_feature_layer=-1), tmp_path / "llava"
    state = load_file(source / "model.safetensors")
    del state["model.language_model.norm.weight"]
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    refused(lambda: to_llava(source, output), "model.language_model.norm.weight is missing", output)


def test_a_full_vocabulary_is_refused_with_the_way_out(tmp_path):
    source = write_llava(tmp_path / "llava", text={"vocab_size": 264})
    refused(lambda: from_llava(str(source), tmp_path / "out"), "of 264 has 1 rows without a token", tmp_path / "out")


def test_a_llava_without_a_template_needs_one(tmp_path):
    source, output = write_llava(tmp_path / "llava"), tmp_path / "pisces"
    template = tmp_path / "template.jinja"
    shutil.move(source / "chat_template.jinja", template)
    refused(lambda: from_llava(str(source), output), "has no chat template. Pass the one it was trained with", output)
    from_llava(str(source), output, chat_template=template)
    assert AutoProcessor.from_pretrained(output).chat_template == template.read_text()


# ---- names, and the commands


def test_every_name_goes_over_and_back():
    for name in ("language_model.lm_head.weight", "language_model.model.layers.3.mlp.up_proj.weight"):
        assert rename(rename(name, LLAVA_TO_PISCES, ""), PISCES_TO_LLAVA, "") == name
    name = "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight"
    assert rename(name, LLAVA_TO_PISCES, "") == "model.vision_tower.encoder.layers.0.self_attn.q_proj.weight"
    assert rename("model.gen_projector.linear_1.bias", PISCES_TO_LLAVA, "") is None


def test_the_commands_do_the_same_and_record_where_it_came_from(tmp_path, capsys):
    source = write_llava(tmp_path / "llava")
    from_llava_main(["--llava", str(source), "--output", str(tmp_path / "pisces")])
    to_llava_main(["--checkpoint", str(tmp_path / "pisces"), "--output", str(tmp_path / "back")])
    assert_same_bits(read_tensors(tmp_path / "back"), read_tensors(source))
    out = capsys.readouterr().out
    assert "9 vectors per image" in out and "load it with LlavaForConditionalGeneration" in out
    assert "llama2" in (tmp_path / "pisces" / "provenance.json").read_text()
    config = PiscesConfig.from_pretrained(tmp_path / "pisces")
    assert config.gen_vision_config is None and config.architectures == ["PiscesForConditionalGeneration"]

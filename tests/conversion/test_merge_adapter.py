"""Base and adapter become one dense checkpoint that computes the same; an adapter of another base is refused by name."""

import copy
import json

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMultimodalLM, AutoProcessor

from conversion import merge_adapter as module
from conversion.checks.probe import draw_vectors, largest_difference, make_probe, text_logits
from conversion.merge_adapter import main, merge_adapter
from tests.checkpoint_folder import write_checkpoint
from tests.conversion.part_fixtures import change_json
from tests.fixtures import make_model, make_processor


LINEARS = r"model\.language_model\..+\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def write_base(folder, dtype=torch.float32, **overrides):
    make_model(**overrides).to(dtype).save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return folder


def write_adapter(folder, base, settings=None, dtype=torch.float32):
    """An adapter whose every trained number is away from its start value, as plain PEFT saves it."""
    model = AutoModelForMultimodalLM.from_pretrained(base, dtype=dtype)
    settings = copy.deepcopy(settings or SETTINGS["lora"])  # PEFT writes into it
    adapted = get_peft_model(model, settings)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(folder)
    return folder


def results(model) -> dict[str, torch.Tensor]:
    probe = make_probe(model.config)
    return {"logits": text_logits(model, probe), "vectors": draw_vectors(model, probe)}


SETTINGS = {
    "lora": LoraConfig(r=2, target_modules=LINEARS),
    "with-projectors-and-head": LoraConfig(
        r=2, target_modules=LINEARS, modules_to_save=["multi_modal_projector", "gen_projector", "gen_head"]
    ),
    "dora": LoraConfig(r=2, target_modules=LINEARS, use_dora=True),
    "rank-stabilised": LoraConfig(r=2, lora_alpha=8, target_modules=LINEARS, use_rslora=True),
    "ia3": IA3Config(target_modules=r".*language_model.*\.(k_proj|down_proj)", feedforward_modules=r".*down_proj"),
    "embedding-rows": LoraConfig(r=2, target_modules=LINEARS, trainable_token_indices={"embed_tokens": [264, 265]}),
}


@pytest.mark.parametrize("head", ["mlp", "flow"])
@pytest.mark.parametrize("kind", SETTINGS)
def test_the_merged_checkpoint_answers_and_draws_as_base_and_adapter_do(kind, head, tmp_path, capsys):
    base = write_base(tmp_path / "base", gen_head_type=head)
    adapter = write_adapter(tmp_path / "adapter", base, SETTINGS[kind])
    plain = AutoModelForMultimodalLM.from_pretrained(base)
    expected = results(PeftModel.from_pretrained(AutoModelForMultimodalLM.from_pretrained(base), adapter).eval())
    found = results(AutoModelForMultimodalLM.from_pretrained(merge_adapter(base, adapter, tmp_path / "merged")))
    # freely drawn vectors: roundings grow from step to step; worst of 12: 6.6e-5; logits 1.2e-6
    for name, difference in (("logits", 1e-5), ("vectors", 2e-4)):
        assert largest_difference(found[name], expected[name]) <= difference
        assert largest_difference(found[name], results(plain)[name]) > 1e-2
    assert "tensors changed; adapter against merged, fp32: text logits" in capsys.readouterr().out


def test_untouched_tensors_keep_their_bytes_and_touched_ones_are_rounded_once(tmp_path):
    """In bf16, also where single tensors are kept in fp32: no tensor changes its dtype."""
    base = write_base(tmp_path / "base", torch.bfloat16)
    stored = load_file(base / "model.safetensors")
    stored["model.gen_head.output.weight"] = torch.randn(stored["model.gen_head.output.weight"].shape)
    save_file(stored, base / "model.safetensors", metadata={"format": "pt"})
    adapter = write_adapter(tmp_path / "adapter", base, SETTINGS["with-projectors-and-head"])
    found = load_file(merge_adapter(base, adapter, tmp_path / "merged") / "model.safetensors")
    model = PeftModel.from_pretrained(AutoModelForMultimodalLM.from_pretrained(base, dtype=torch.float32), adapter)
    expected = model.merge_and_unload().state_dict()
    assert found.keys() == stored.keys()
    changed = {name for name in stored if not torch.equal(found[name], stored[name])}
    assert len(changed) == 2 * 7 + 4 + 4 + 4
    assert all("language_model.layers" in name or "proj" in name or "gen_head" in name for name in changed)
    for name, tensor in found.items():
        assert tensor.dtype == stored[name].dtype
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name


def test_decoder_and_processor_come_along_and_stale_files_do_not(tmp_path):
    base = write_checkpoint(tmp_path / "base")
    (base / "README.md").write_text("the card of the base")
    (base / "optimizer.pt").write_bytes(b"left by a training")
    (base / "checkpoint-3").mkdir()
    (base / "checkpoint-3" / "trainer_state.json").write_text("{}")
    adapter = write_adapter(tmp_path / "adapter", base)
    merged = merge_adapter(base, adapter, tmp_path / "merged", max_shard_size="40KB")
    assert len(list(merged.glob("model-*.safetensors"))) > 1 and not (merged / "model.safetensors").exists()
    for part in ("unet", "vae", "scheduler"):
        for path in (base / part).iterdir():
            assert (merged / part / path.name).read_bytes() == path.read_bytes()
    for name in ("config.json", "generation_config.json", "tokenizer.json", "processor_config.json"):
        assert (merged / name).read_bytes() == (base / name).read_bytes()
    assert (merged / "model_index.json").is_file()
    assert AutoProcessor.from_pretrained(merged).num_image_tokens == 9
    strangers = {"README.md", "optimizer.pt", "checkpoint-3"}
    assert not strangers & {path.name for path in merged.iterdir()}


def test_an_understanding_only_base_is_merged_without_drawing(tmp_path, capsys):
    model = make_model(gen_vision_config=None)
    model.save_pretrained(tmp_path / "base")
    make_processor().save_pretrained(tmp_path / "base")
    write_adapter(tmp_path / "adapter", tmp_path / "base")
    merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    out = capsys.readouterr().out
    assert "text logits" in out and "drawn vectors" not in out


# ---- refusals


def refused(match: str, tmp_path) -> None:
    output = tmp_path / "merged"
    with pytest.raises(ValueError, match=match):
        merge_adapter(tmp_path / "base", tmp_path / "adapter", output)
    assert not output.exists() and not list(tmp_path.glob(".merged*"))


def test_an_adapter_of_a_wider_base_is_refused_by_tensor_and_shapes(tmp_path):
    wide = dict(make_model().config.text_config.to_dict(), hidden_size=48, head_dim=8)
    write_base(tmp_path / "wide", text_config=wide)
    write_adapter(tmp_path / "adapter", tmp_path / "wide")
    write_base(tmp_path / "base")
    refused(r"layers.0.mlp.down_proj.lora_B.weight has the shape \(48, 2\), the base needs \(32, 2\)", tmp_path)


def test_an_adapter_of_a_deeper_base_is_refused_by_tensor(tmp_path):
    deep = dict(make_model().config.text_config.to_dict(), num_hidden_layers=3)
    write_base(tmp_path / "deep", text_config=deep)
    write_adapter(tmp_path / "adapter", tmp_path / "deep")
    write_base(tmp_path / "base")
    refused(r"layers.2.mlp.down_proj.lora_A.weight has no place in this base. It was made for .*deep", tmp_path)


def test_an_adapter_of_another_head_is_refused_by_tensor(tmp_path):
    write_base(tmp_path / "flow", gen_head_type="flow")
    write_adapter(tmp_path / "adapter", tmp_path / "flow", SETTINGS["with-projectors-and-head"])
    write_base(tmp_path / "base", gen_head_type="linear")
    refused(r"model.gen_head.blocks.0.mlp.0.bias has no place in this base", tmp_path)


def test_an_adapter_with_a_lost_tensor_is_refused_by_name(tmp_path):
    write_adapter(tmp_path / "adapter", write_base(tmp_path / "base"))
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    state = load_file(path)
    lost = state.pop("base_model.model.model.language_model.layers.1.self_attn.q_proj.lora_B.weight")
    assert lost.shape == (32, 2)
    save_file(state, path)
    refused("layers.1.self_attn.q_proj.lora_B.weight is missing, which the adapter's config asks for", tmp_path)


def test_targets_that_the_base_lacks_are_refused(tmp_path):
    write_adapter(tmp_path / "adapter", write_base(tmp_path / "base"))
    change_json(tmp_path / "adapter" / "adapter_config.json", target_modules=["c_attn"])
    refused("the adapter does not fit this base .*c_attn", tmp_path)


def test_an_adapter_that_changes_nothing_is_refused(tmp_path):
    base = write_base(tmp_path / "base")
    model = AutoModelForMultimodalLM.from_pretrained(base)
    get_peft_model(model, LoraConfig(r=2, target_modules=LINEARS)).save_pretrained(tmp_path / "adapter")
    refused("changes no tensor of .*base; nothing to merge", tmp_path)


def test_a_head_that_was_untied_by_training_is_refused(tmp_path):
    base = write_base(tmp_path / "base", tie_word_embeddings=True)
    settings = LoraConfig(r=2, target_modules=LINEARS, modules_to_save=["lm_head"])
    write_adapter(tmp_path / "adapter", base, settings)
    refused("lm_head.weight: the adapter trained it apart from the embedding", tmp_path)


def test_a_pickled_adapter_is_refused(tmp_path):
    write_adapter(tmp_path / "adapter", write_base(tmp_path / "base"))
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    path.rename(path.with_suffix(".bin"))
    refused("found adapter_model.bin, expected adapter_model.safetensors", tmp_path)


def test_a_folder_without_an_adapter_is_refused(tmp_path):
    write_base(tmp_path / "base")
    (tmp_path / "adapter").mkdir()
    refused("adapter_config.json: not found", tmp_path)


def test_a_prompt_has_no_dense_form(tmp_path):
    write_base(tmp_path / "base")
    write_adapter(tmp_path / "adapter", tmp_path / "base")
    settings = PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM").to_dict()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings, default=str))
    refused("has no dense form and cannot be merged", tmp_path)


def test_a_merge_that_computes_something_else_is_not_saved(tmp_path, monkeypatch):
    write_adapter(tmp_path / "adapter", write_base(tmp_path / "base"))
    merge = PeftModel.merge_and_unload if hasattr(PeftModel, "merge_and_unload") else None
    assert merge is None  # it lives on the tuner, which PeftModel hands out by attribute
    from peft.tuners.lora import LoraModel

    def wrong(self, **options):
        model = original(self, **options)
        with torch.no_grad():
            model.model.language_model.layers[0].mlp.up_proj.weight[0, 0] += 0.1
        return model

    original = LoraModel.merge_and_unload
    monkeypatch.setattr(LoraModel, "merge_and_unload", wrong)
    refused(r"adapter and merged model differ by \d.\de-0\d in text logits, more than 1e-05", tmp_path)


def test_the_command_merges(tmp_path):
    base = write_base(tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", base)
    main(["--base", str(base), "--adapter", str(adapter), "--output", str(tmp_path / "merged")])
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    assert module.TOLERANCE == 1e-5

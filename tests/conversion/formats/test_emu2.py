"""Claims about `conversion.from_emu2_gen`: names and shapes at full size, numbers at small size, and what it refuses."""

import json
import shutil
from math import prod

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file


pytest.importorskip("diffusers")

from conversion.assembly.parts import open_part
from conversion.formats.emu2 import TOWER_KEYS, check_names, expand_tower_keys, expand_zero_keys, tower_config
from conversion.from_emu2_gen import from_emu2_gen, main, plan_tower
from conversion.storage.command import run_command
from conversion.storage.tensors import SourceTensor
from modeling_pisces import PiscesGenVisionConfig, PiscesGenVisionModel, pool_patches
from modeling_pisces.checkpoint.loading import load_image_processor
from modeling_pisces.pipeline_pisces import PiscesPipeline
from tests.conversion.formats.emu2_fixtures import (
    FULL_SIZE,
    SMALL_SIZE,
    EvaTower,
    encoder_state,
    make_tower,
    pool,
    serve,
    write_emu2_gen,
)
from tests.conversion.part_fixtures import change_json


@pytest.fixture(scope="module")
def emu2_gen(tmp_path_factory):
    return write_emu2_gen(tmp_path_factory.mktemp("emu2") / "Emu2-Gen")


@pytest.fixture(scope="module")
def converted(emu2_gen):
    return from_emu2_gen(str(emu2_gen), emu2_gen.parent / "converted")


# ---- names and shapes, at full size on the meta device


def full_size_sources(tmp_path):
    """Where each tensor of the published tower would lie; nothing is read from there."""
    with torch.device("meta"):
        state = EvaTower(FULL_SIZE).state_dict()
    return {
        f"model.visual.{name}": SourceTensor(
            tmp_path / "x", f"model.visual.{name}", "BF16", tuple(t.shape), 0, 2 * t.numel()
        )
        for name, t in state.items()
    }


def test_the_published_config_is_the_default_generation_tower():
    config = tower_config(FULL_SIZE)
    assert config.to_dict() == PiscesGenVisionConfig().to_dict()
    assert config.hidden_size // config.num_attention_heads == 112
    assert (config.intermediate_size, config.num_hidden_layers) == (15360, 64)


def test_every_published_name_is_mapped_and_every_tensor_of_the_model_is_filled(tmp_path):
    sources = full_size_sources(tmp_path)
    assert set(expand_tower_keys(64)) == set(sources)
    check_names([*sources, "model.decoder.lm.lm_head.weight", "project_up.weight", "project_down.weight"], 64)
    with torch.device("meta"):
        model = PiscesGenVisionModel(PiscesGenVisionConfig())
    planned = {tensor.name: tensor.shape for tensor in plan_tower(sources, PiscesGenVisionConfig())}
    assert planned == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def test_the_full_tower_has_the_published_number_of_parameters(tmp_path):
    sources, zeros = full_size_sources(tmp_path), expand_zero_keys(64)
    published = sum(prod(tensor.shape) for tensor in sources.values())
    planned = plan_tower(sources, PiscesGenVisionConfig())
    assert published == 4_350_093_568  # "4.4B", EVA-02-CLIP-E/14+ in arXiv 2303.15389
    assert sum(prod(tensor.shape) for tensor in planned) == published + 1792 * len(zeros)
    config = PiscesGenVisionConfig()
    side = config.image_size // config.patch_size
    assert (side // 4) ** 2 == FULL_SIZE["n_query"] == 64  # pooled 4 x 4


def test_the_three_blocks_of_a_fused_matrix_are_queries_keys_and_values(tmp_path):
    name = "model.visual.blocks.5.attn.qkv.weight"
    planned = {tensor.name: tensor for tensor in plan_tower(full_size_sources(tmp_path), PiscesGenVisionConfig())}
    size = 2 * 1792 * 1792
    for number, letter in enumerate("qkv"):
        source = planned[f"layers.5.self_attn.{letter}_proj.weight"].source
        assert (source.name, source.start, source.end) == (name, number * size, (number + 1) * size)


def test_no_two_lines_of_the_table_write_the_same_tensor():
    targets = [name for names in expand_tower_keys(3).values() for name in names] + list(expand_zero_keys(3))
    assert len(targets) == len(set(targets)) == 3 * 16 + 4
    assert len(TOWER_KEYS) == 17


# ---- numbers, at small size


def test_the_converted_tower_computes_what_emu2_computes(converted):
    theirs = make_tower()
    ours, report = PiscesGenVisionModel.from_pretrained(converted / "gen_vision_tower", output_loading_info=True)
    assert not any(report.values()), report
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, found = theirs(pixels), ours(pixels).last_hidden_state
        torch.testing.assert_close(found, expected.flatten(1, 2), rtol=0, atol=1e-5)  # measured: 1.5e-6
        torch.testing.assert_close(pool_patches(found, 2), pool(expected, 2), rtol=0, atol=1e-5)
    assert expected.std() > 0.5


def test_weights_are_copied_byte_by_byte(emu2_gen, converted):
    state = encoder_state(make_tower())
    ours = load_file(converted / "gen_vision_tower" / "model.safetensors")
    fused = [ours[f"layers.1.self_attn.{letter}_proj.weight"] for letter in "qkv"]
    assert torch.equal(torch.cat(fused), state["model.visual.blocks.1.attn.qkv.weight"])
    assert torch.equal(ours["embeddings.position_embedding"], state["model.visual.pos_embed"][0])
    assert not ours["layers.1.self_attn.k_proj.bias"].any()
    for component in ("unet", "vae"):
        file = emu2_gen / component / "diffusion_pytorch_model.bf16.safetensors"
        copied = load_file(converted / "decoder" / component / "diffusion_pytorch_model.safetensors")
        original = load_file(file)
        assert copied.keys() == original.keys() and all(torch.equal(copied[key], original[key]) for key in original)


def test_bfloat16_stays_bfloat16(tmp_path):
    source = write_emu2_gen(tmp_path / "Emu2-Gen", dtype=torch.bfloat16)
    from_emu2_gen(str(source), tmp_path / "out")
    with safe_open(tmp_path / "out" / "gen_vision_tower" / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}
    assert (
        PiscesGenVisionModel.from_pretrained(tmp_path / "out" / "gen_vision_tower", dtype="auto").dtype
        == torch.bfloat16
    )


def test_the_decoder_draws_what_emu2s_own_parts_draw(emu2_gen, converted):
    """The same loop as Emu2's: vectors to the cross attention, their mean and the sizes to the added embedding."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel

    pipe = PiscesPipeline.from_pretrained(converted / "decoder")
    pipe.set_progress_bar_config(disable=True)
    assert (pipe.config.default_num_inference_steps, pipe.config.default_guidance_scale) == (50, 3.0)
    unet = UNet2DConditionModel.from_pretrained(emu2_gen / "unet", variant="bf16")
    vae = AutoencoderKL.from_pretrained(emu2_gen / "vae", variant="bf16")
    scheduler = EulerDiscreteScheduler.from_pretrained(emu2_gen / "scheduler")
    draw = torch.Generator().manual_seed(0)
    vectors, negative = torch.randn(2, 1, 4, 12, generator=draw)
    noise = torch.randn(1, 4, 8, 8, generator=draw)
    found = pipe(
        image_vectors=vectors,
        negative_image_vectors=negative,
        latents=noise,
        num_inference_steps=3,
        output_type="pt",
    ).images

    scheduler.set_timesteps(3)
    latents = noise * scheduler.init_noise_sigma
    both = torch.cat([vectors, negative])
    added = {"text_embeds": both.mean(1), "time_ids": torch.tensor([[16.0, 16, 0, 0, 16, 16]] * 2)}
    with torch.no_grad():
        for step in scheduler.timesteps:
            scaled = scheduler.scale_model_input(torch.cat([latents] * 2), step)
            towards, away = unet(scaled, step, both, added_cond_kwargs=added).sample.chunk(2)
            latents = scheduler.step(away + 3 * (towards - away), step, latents).prev_sample
        expected = (vae.decode(latents / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_the_image_processor_squeezes_as_emu2_does(converted):
    processor = load_image_processor(converted / "gen_vision_tower")
    settings = processor.to_dict()
    assert dict(settings["size"]) == {"height": 16, "width": 16} and not settings["do_center_crop"]
    assert settings["resample"] == 3  # bicubic
    assert settings["image_mean"] == pytest.approx([0.48145466, 0.4578275, 0.40821073])
    assert settings["image_std"] == pytest.approx([0.26862954, 0.26130258, 0.27577711])


# ---- folders


def test_both_folders_open_as_parts_with_the_license_of_emu2(converted):
    tower = open_part(str(converted / "gen_vision_tower"), role="gen_vision_tower")
    decoder = open_part(str(converted / "decoder"), role="decoder")
    assert (tower.license, decoder.license) == ("emu2-non-commercial", "emu2-non-commercial")
    assert tower.config.hidden_size == 12
    assert "non-commercial" in (converted / "decoder" / "README.md").read_text()


def test_provenance_names_source_license_and_what_is_new(converted):
    whole = json.loads((converted / "provenance.json").read_text())["tensors"]
    tower = json.loads((converted / "gen_vision_tower" / "provenance.json").read_text())["tensors"]
    entry = tower["layers.2.self_attn.v_proj.weight"]
    assert (entry["source"], entry["license"]) == ("model.visual.blocks.2.attn.qkv.weight", "emu2-non-commercial")
    new = {name for name, entry in tower.items() if "initialized" in entry}
    assert new == {f"layers.{n}.self_attn.k_proj.bias" for n in range(3)}
    assert whole["gen_vision_tower/layers.2.self_attn.v_proj.weight"]["sha256"] == entry["sha256"]
    assert sum(name.startswith("decoder/unet.") for name in whole) > 10


def test_converting_twice_gives_the_same_bytes(emu2_gen, converted, tmp_path):
    again = from_emu2_gen(str(emu2_gen), tmp_path / "converted")
    files = sorted(path.relative_to(converted) for path in converted.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    for file in files:
        assert (again / file).read_bytes() == (converted / file).read_bytes(), file


def test_shards_of_the_language_model_need_not_be_there(emu2_gen, tmp_path):
    source = write_emu2_gen(tmp_path / "Emu2-Gen")
    (source / "multimodal_encoder" / "model.bf16-00003-of-00003.safetensors").unlink()
    assert from_emu2_gen(str(source), tmp_path / "out").is_dir()


def test_weights_without_a_variant_are_taken_when_asked(tmp_path):
    source = write_emu2_gen(tmp_path / "Emu2-Gen", variant=None)
    with pytest.raises(ValueError, match=r"model\.bf16\.safetensors: not found; the weights there are model-00001-of"):
        from_emu2_gen(str(source), tmp_path / "out")
    from_emu2_gen(str(source), tmp_path / "out", variant="none")
    assert not (tmp_path / "out" / "decoder" / "unet" / "diffusion_pytorch_model.bf16.safetensors").exists()


def test_the_command_says_what_it_took_and_what_it_left(emu2_gen, tmp_path, capsys):
    main(["--emu2_gen", str(emu2_gen), "--output", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "gen_vision_tower: 52 tensors, 43 of" in printed
    assert "left behind: 3 tensors model.decoder.*" in printed
    assert "license: emu2-non-commercial" in printed


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize("in_shards", [True, False])
def test_of_a_hub_repository_only_the_tower_and_the_decoder_are_fetched(in_shards, emu2_gen, tmp_path, monkeypatch):
    source = shutil.copytree(emu2_gen, tmp_path / "repository")
    encoder = source / "multimodal_encoder"
    (source / "safety_checker").mkdir()
    (source / "safety_checker" / "model.bf16.safetensors").write_bytes(b"large")
    if not in_shards:
        shards = sorted(encoder.glob("*.safetensors"))
        save_file({k: v for shard in shards for k, v in load_file(shard).items()}, encoder / "model.bf16.safetensors")
        for path in (*shards, encoder / "model.safetensors.index.bf16.json"):
            path.unlink()
    fetched = serve(monkeypatch, source, tmp_path / "cache")
    from_emu2_gen("BAAI/Emu2-Gen", tmp_path / "out", revision=COMMIT)
    weights = [name for name in fetched if name.endswith(".safetensors")]
    shards = [f"model.bf16-0000{n}-of-00003.safetensors" for n in (1, 2)] if in_shards else ["model.bf16.safetensors"]
    decoder = [f"{part}/diffusion_pytorch_model.bf16.safetensors" for part in ("unet", "vae")]
    assert sorted(weights) == sorted([f"multimodal_encoder/{shard}" for shard in shards] + decoder)
    provenance = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert provenance["parts"]["emu2_gen"]["revision"] == COMMIT
    assert {entry["revision"] for entry in provenance["tensors"].values()} == {COMMIT, None}  # None: zero key biases
    assert COMMIT in (tmp_path / "out" / "decoder" / "README.md").read_text()
    # the Hub's cache is a local folder too, and named by its commit
    snapshot = tmp_path / "cache" / "models--BAAI--Emu2-Gen" / "snapshots" / COMMIT
    again = from_emu2_gen(str(snapshot), tmp_path / "again")
    assert json.loads((again / "provenance.json").read_text())["parts"]["emu2_gen"]["revision"] == COMMIT


def test_a_hub_that_does_not_answer_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match=f"^BAAI/Emu2-Gen at {COMMIT}: the Hub did not give it"):
        from_emu2_gen("BAAI/Emu2-Gen", tmp_path / "out", revision=COMMIT)
    with pytest.raises(ValueError, match=r"a revision .* is given for a local folder. Leave it out"):
        from_emu2_gen(str(tmp_path), tmp_path / "out", revision=COMMIT)


# ---- what is refused, before anything is written


def change_shard(folder, change):
    """Rewrite the first shard of the encoder, and its index, after `change(state)`."""
    path = folder / "multimodal_encoder" / "model.bf16-00001-of-00003.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path)
    index = folder / "multimodal_encoder" / "model.safetensors.index.bf16.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    weight_map = {name: file for name, file in weight_map.items() if file != path.name} | dict.fromkeys(
        state, path.name
    )
    change_json(index, weight_map=weight_map)


def rename(state, old, new):
    state[new] = state.pop(old)


CLS = "model.visual.cls_token"
FC1 = "model.visual.blocks.0.mlp.fc1.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop(CLS), r"model\.visual\.cls_token is missing .*1 of 43 tensors"),
        (lambda s: rename(s, CLS, "model.visual.norm.bias"), r"model\.visual\.cls_token is missing"),
        (
            lambda s: s.update({"model.visual.norm.bias": torch.zeros(12)}),
            r"model\.visual\.norm\.bias .* is not known",
        ),
        (lambda s: s.update({"model.text.x": torch.zeros(2)}), r"model\.text\.x in multimodal_encoder is not known"),
        (
            lambda s: s.update({FC1: torch.zeros(31, 12)}),
            r"layers\.0\.mlp\.fc1\.weight has shape \(31, 12\), .* \(30, 12\)",
        ),
        (lambda s: s.update({FC1: s[FC1].half()}), r"fc1\.weight is F16 but .* is F32; expected one dtype"),
    ],
    ids=["missing", "renamed", "extra in the tower", "extra elsewhere", "misshapen", "dtypes mixed"],
)
def test_a_wrong_tower_is_refused_by_its_key(change, message, tmp_path):
    source = write_emu2_gen(tmp_path / "Emu2-Gen")
    change_shard(source, change)
    with pytest.raises(ValueError, match=message):
        from_emu2_gen(str(source), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["Emu2-Gen"]


def test_a_truncated_shard_is_refused(tmp_path):
    source = write_emu2_gen(tmp_path / "Emu2-Gen")
    path = source / "multimodal_encoder" / "model.bf16-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"00002-of-00003\.safetensors: .* bytes, expected .*; the file is cut off"):
        from_emu2_gen(str(source), tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"postnorm": False}, r"vision_config\.postnorm is False, expected True"),
        ({"subln": True}, r"vision_config\.subln is True, expected False"),
        ({"width": None}, r"no vision_config\.width"),
        ({"layers": 4}, r"blocks\.3\.attn\.qkv\.weight is missing .* the 4 layers"),
    ],
)
def test_another_kind_of_tower_is_refused(changes, message, tmp_path):
    source = write_emu2_gen(tmp_path / "Emu2-Gen")
    settings = {name: value for name, value in (SMALL_SIZE | changes).items() if value is not None}
    change_json(source / "multimodal_encoder" / "config.json", vision_config=settings)
    with pytest.raises(ValueError, match=message):
        from_emu2_gen(str(source), tmp_path / "out")


def test_a_decoder_that_reads_other_vectors_is_refused(tmp_path):
    source = write_emu2_gen(tmp_path / "Emu2-Gen", unet={"cross_attention_dim": 14})
    with pytest.raises(ValueError, match="has vectors of width 12 but the decoder's U-Net reads width 14"):
        from_emu2_gen(str(source), tmp_path / "out")


def test_a_unet_that_does_not_fit_its_config_is_refused(tmp_path):
    source = write_emu2_gen(tmp_path / "Emu2-Gen")
    path = source / "unet" / "diffusion_pytorch_model.bf16.safetensors"
    state = load_file(path)
    rename(state, "conv_in.bias", "conv_in.bios")
    save_file(state, path)
    with pytest.raises(ValueError, match=r"emu2_gen, unet: conv_in\.bias is missing; expected shape \(8,\)"):
        from_emu2_gen(str(source), tmp_path / "out")


def test_a_hub_id_needs_a_pinned_revision(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_command(main, ["--emu2_gen", "BAAI/Emu2-Gen", "--revision", "main", "--output", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert error.startswith("error: BAAI/Emu2-Gen: revision is 'main', expected the 40 hexadecimal digits")
    assert error.count("\n") == 1

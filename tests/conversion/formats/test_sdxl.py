"""Claims about `conversion.from_sdxl`: what is kept, what is new, that it loads and trains, and what it refuses."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file


pytest.importorskip("diffusers")

from diffusers import EulerDiscreteScheduler, UNet2DConditionModel

from conversion.assembly.parts import open_part
from conversion.from_sdxl import from_sdxl, main, resize_unet, resized_config
from conversion.storage.command import run_command
from conversion.storage.decoder import build_component, change_scheduler, state_shapes
from conversion.storage.tensors import SourceTensor
from modeling_pisces.pipeline_pisces import PiscesPipeline
from tests.conversion.formats.emu2_fixtures import serve, write_decoder_parts
from tests.conversion.part_fixtures import change_json


OLD, NEW, POOLED, TIME = 10, 12, 7, 8  # widths: SDXL's text, the new vectors, SDXL's pooled text, one size

# stabilityai/stable-diffusion-xl-base-1.0, unet/config.json, without what is diffusers' default
SDXL_UNET = {
    "_class_name": "UNet2DConditionModel",
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "use_linear_projection": True,
}


def write_sdxl(folder, variant=None, license="openrail++", **unet):
    widths = {"cross_attention_dim": OLD, "projection_class_embeddings_input_dim": POOLED + 6 * TIME}
    write_decoder_parts(folder, variant, {**widths, **unet})
    parts = {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline", **parts}))
    if license:
        (folder / "README.md").write_text(f"---\nlicense: {license}\n---\n")
    return folder


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    return write_sdxl(tmp_path_factory.mktemp("sdxl") / "sdxl-base")


@pytest.fixture(scope="module")
def resized(sdxl):
    return from_sdxl(str(sdxl), NEW, sdxl.parent / "resized")


def weights(folder, component="unet"):
    return load_file(folder / component / "diffusion_pytorch_model.safetensors")


# ---- full size


def test_the_published_unet_becomes_that_of_emu2_in_shape(tmp_path):
    """2.57 billion parameters before, Emu2-Gen's 2.53 billion after: the same U-Net for vectors of width 1792."""
    old, new = build_component("unet", SDXL_UNET), build_component("unet", resized_config(SDXL_UNET, 1792))
    assert sum(p.numel() for p in old.parameters()) == 2_567_463_684
    assert sum(p.numel() for p in new.parameters()) == 2_525_520_644
    before, after = state_shapes(old), state_shapes(new)
    changed = {name for name in before if before[name] != after[name]}
    assert before.keys() == after.keys() and len(before) == 1680
    assert len(changed) == 141 and "add_embedding.linear_1.weight" in changed
    assert all(
        name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))
        for name in changed - {"add_embedding.linear_1.weight"}
    )
    assert after["add_embedding.linear_1.weight"] == (1280, 1792 + 6 * 256)


# ---- what is kept and what is new


def test_all_but_the_condition_is_kept_byte_by_byte(sdxl, resized):
    old, new = weights(sdxl), weights(resized)
    assert old.keys() == new.keys()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    attention = {name for name in old if "attn2.to_k" in name or "attn2.to_v" in name}
    assert changed == attention | {"add_embedding.linear_1.weight"}
    assert all(new[name].shape[1] == NEW for name in attention) and len(attention) == 8
    vae = weights(resized, "vae")
    assert all(torch.equal(vae[name], tensor) for name, tensor in weights(sdxl, "vae").items())


def test_columns_of_sizes_and_crop_are_kept_and_those_of_the_mean_vector_start_at_zero(sdxl, resized):
    old, new = (weights(folder)["add_embedding.linear_1.weight"] for folder in (sdxl, resized))
    assert new.shape[1] == NEW + 6 * TIME
    assert torch.equal(new[:, NEW:], old[:, POOLED:])
    assert not new[:, :NEW].any()


def test_new_projections_answer_with_the_spread_that_the_old_ones_had():
    draw = torch.Generator().manual_seed(0)
    old = torch.randn(400, 64, generator=draw) * 0.05
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"

    class Source(SourceTensor):
        def load(self):
            return old

    source = Source(None, name, "F32", (400, 64), 0, 0)
    (planned,), _ = resize_unet({name: source}, {}, {name: (400, 256)}, seed=1)  # not the numbers of `draw`
    inputs = torch.randn(1000, 256, generator=draw), torch.randn(1000, 64, generator=draw)
    new_spread, old_spread = (inputs[0] @ planned.tensor.T).std(), (inputs[1] @ old.T).std()
    assert new_spread.item() == pytest.approx(old_spread.item(), rel=0.02)  # measured: 0.1 %


def test_an_unchanged_width_keeps_everything(sdxl, tmp_path, capsys):
    source = write_sdxl(
        tmp_path / "sdxl", cross_attention_dim=NEW, projection_class_embeddings_input_dim=NEW + 6 * TIME
    )
    from_sdxl(str(source), NEW, tmp_path / "out")
    old, new = weights(source), weights(tmp_path / "out")
    assert all(torch.equal(old[name], new[name]) for name in old)
    assert "nothing is new" in capsys.readouterr().out


def test_one_seed_gives_the_same_bytes_and_another_other_weights(sdxl, resized, tmp_path):
    again = from_sdxl(str(sdxl), NEW, tmp_path / "again")
    files = sorted(path.relative_to(resized) for path in resized.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    assert all((again / file).read_bytes() == (resized / file).read_bytes() for file in files)
    other = from_sdxl(str(sdxl), NEW, tmp_path / "other", seed=1)
    name = next(key for key in weights(resized) if key.endswith("attn2.to_k.weight"))
    assert not torch.equal(weights(other)[name], weights(resized)[name])


# ---- it works


def test_the_result_draws_and_the_vectors_matter(resized):
    pipe = PiscesPipeline.from_pretrained(resized)
    pipe.set_progress_bar_config(disable=True)
    draw = torch.Generator().manual_seed(0)
    vectors, negative = torch.randn(2, 1, 4, NEW, generator=draw)
    noise = torch.randn(1, 4, 8, 8, generator=draw)
    settings = {"latents": noise, "num_inference_steps": 2, "output_type": "pt"}
    first = pipe(image_vectors=vectors, negative_image_vectors=negative, **settings).images
    second = pipe(image_vectors=negative, negative_image_vectors=vectors, **settings).images
    assert first.isfinite().all() and (first - second).abs().max() > 1e-3


def test_every_new_weight_learns_from_the_first_step(resized):
    """Zeros in the added embedding are no dead end: their inputs and the layers behind them are not zero."""
    unet = UNet2DConditionModel.from_pretrained(resized / "unet")
    draw = torch.Generator().manual_seed(0)
    vectors = torch.randn(2, 4, NEW, generator=draw)
    added = {"text_embeds": vectors.mean(1), "time_ids": torch.full((2, 6), 16.0)}
    out = unet(torch.randn(2, 4, 8, 8, generator=draw), 10, vectors, added_cond_kwargs=added).sample
    out.square().mean().backward()
    grads = dict(unet.named_parameters())
    assert grads["add_embedding.linear_1.weight"].grad[:, :NEW].abs().min() > 0
    assert all(p.grad.abs().max() > 0 for name, p in grads.items() if "attn2.to_" in name)


def test_the_scheduler_is_sdxls_own_unless_asked(sdxl, resized, tmp_path):
    own = json.loads((sdxl / "scheduler" / "scheduler_config.json").read_text())
    assert json.loads((resized / "scheduler" / "scheduler_config.json").read_text()) == own
    arguments = ["--prediction_type", "v_prediction", "--zero_terminal_snr"]
    main(["--sdxl", str(sdxl), "--gen_vector_size", str(NEW), "--output", str(tmp_path / "out"), *arguments])
    scheduler = EulerDiscreteScheduler.from_pretrained(tmp_path / "out" / "scheduler")
    assert scheduler.config.prediction_type == "v_prediction"
    assert scheduler.alphas_cumprod[-1] < 1e-6 < EulerDiscreteScheduler.from_config(own).alphas_cumprod[-1]
    scheduler.set_timesteps(5)
    assert scheduler.timesteps[0] == 999


# ---- what it says


def test_the_command_prints_what_is_kept_and_what_is_new(sdxl, tmp_path, capsys):
    main(["--sdxl", str(sdxl), "--gen_vector_size", str(NEW), "--output", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    num_tensors = len(weights(sdxl))
    assert f"unet kept {num_tensors - 9} tensors" in printed
    assert "new: cross attention, 8 tensors" in printed
    assert "columns 0 to 11 (mean of the vectors): zeros; the 48 of sizes and crop are kept" in printed


def test_provenance_and_card_say_what_is_new_and_keep_the_license(resized):
    tensors = json.loads((resized / "provenance.json").read_text())["tensors"]
    new = {name for name, entry in tensors.items() if "initialized" in entry}
    assert len(new) == 9 and all(name.startswith("unet.") for name in new)
    name = next(name for name in new if name.endswith("to_k.weight"))
    assert "normal, std " in tensors[name]["initialized"] and "seed 0" in tensors[name]["initialized"]
    assert tensors["vae.decoder.conv_in.weight"]["license"] == "openrail++"
    assert open_part(str(resized), role="decoder").license == "openrail++"
    assert f"{len(new)} tensors of the U-Net are new" in (resized / "README.md").read_text()


def test_half_precision_weights_are_taken_by_their_variant(tmp_path):
    source = write_sdxl(tmp_path / "sdxl", variant="fp16", license=None)
    with pytest.raises(
        ValueError, match=r"diffusion_pytorch_model\.safetensors: not found; the weights there are .*fp16"
    ):
        from_sdxl(str(source), NEW, tmp_path / "out")
    from_sdxl(str(source), NEW, tmp_path / "out", variant="fp16")
    assert (
        weights(tmp_path / "out").keys()
        == load_file(source / "unet" / "diffusion_pytorch_model.fp16.safetensors").keys()
    )
    assert "license" not in (tmp_path / "out" / "README.md").read_text().split("# ")[0]


def test_of_a_hub_repository_one_precision_is_fetched(tmp_path, monkeypatch):
    source = write_sdxl(tmp_path / "repository")
    for name in ("unet/diffusion_pytorch_model.fp16.safetensors", "sd_xl_base_1.0.safetensors"):
        (source / name).write_bytes(b"large")
    fetched = serve(monkeypatch, source, tmp_path / "cache")
    from_sdxl("stabilityai/stable-diffusion-xl-base-1.0", NEW, tmp_path / "out", revision="0" * 40)
    weights = [name for name in fetched if name.endswith(".safetensors")]
    assert weights == [f"{part}/diffusion_pytorch_model.safetensors" for part in ("unet", "vae")]
    tensors = json.loads((tmp_path / "out" / "provenance.json").read_text())["tensors"]
    assert tensors["vae.decoder.conv_in.weight"]["revision"] == "0" * 40


# ---- what is refused, before anything is written


def test_a_misshapen_tensor_is_refused_by_name(tmp_path):
    source = write_sdxl(tmp_path / "sdxl")
    path = source / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    save_file(state | {"conv_in.bias": torch.zeros(9)}, path)
    with pytest.raises(ValueError, match=r"sdxl, unet: conv_in\.bias has shape \(9,\), its config asks for \(8,\)"):
        from_sdxl(str(source), NEW, tmp_path / "out")
    save_file(state | {"conv_on.bias": torch.zeros(9)}, path)
    with pytest.raises(ValueError, match=r"sdxl, unet: conv_on\.bias is not known"):
        from_sdxl(str(source), NEW, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["sdxl"]


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("unet", {"_class_name": "FluxTransformer2DModel"}, "unet is a 'FluxTransformer2DModel', expected a UNet2D"),
        ("unet", {"encoder_hid_dim": 5, "encoder_hid_dim_type": "text_proj"}, "encoder_hid_dim is 5, expected None"),
        ("vae", {"_class_name": "AutoencoderDC"}, "vae is a 'AutoencoderDC', expected a AutoencoderKL"),
    ],
)
def test_another_architecture_is_refused(file, changes, message, tmp_path):
    source = write_sdxl(tmp_path / "sdxl")
    change_json(source / file / "config.json", **changes)
    with pytest.raises(ValueError, match=message):
        from_sdxl(str(source), NEW, tmp_path / "out")


def test_settings_that_exclude_each_other_are_refused(sdxl, tmp_path):
    with pytest.raises(ValueError, match="zero_terminal_snr needs prediction_type v_prediction"):
        from_sdxl(str(sdxl), NEW, tmp_path / "out", zero_terminal_snr=True)
    with pytest.raises(ValueError, match="gen_vector_size is 0; expected the width of the vectors"):
        from_sdxl(str(sdxl), 0, tmp_path / "out")
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler has no setting prediction_type"):
        change_scheduler(scheduler, "v_prediction", False)


def test_a_command_ends_with_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_command(main, ["--sdxl", str(tmp_path), "--gen_vector_size", "12", "--output", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "model_index.json: not found" in error and error.count("\n") == 1

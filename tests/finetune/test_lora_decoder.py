"""Claims about `finetune.lora_decoder`: a look is learned, kept in diffusers' own file, and comes off to the last bit."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from pisces_commands.arguments import UsageError
from tests.fixtures import make_model, make_processor
from tests.hub_server import HubServer


pytest.importorskip("diffusers")

from finetune import lora_decoder
from finetune.parts import decoder, trainer
from finetune.parts.captioned import load_pictures
from finetune.parts.pictures import to_pixel_values
from finetune.scratch.decoder_lora import WEIGHTS, DecoderLora, push_adapter
from modeling_pisces import PiscesPipeline
from tests.modeling_pisces.pipeline.pipeline_fixtures import DG, make_pipeline


ROOT = Path(__file__).parents[2]
SMALL = ["--per_device_train_batch_size", "4", "--warmup_steps", "1", "--logging_steps", "1", "--save_steps", "4"]
SMALL += ["--num_eval_pictures", "2", "--ema_decay", "0.5", "--lora_r", "4"]


def write_look(folder, number=10, size=64):
    """Thick dark outlines on coloured paper, with captions."""
    folder.mkdir()
    for index in range(number):
        picture = Image.new("RGB", (size, size), ((250, 236, 200), (214, 234, 248))[index % 2])
        box = [size // 6 + index, size // 6, size - size // 4, size - size // 4]
        pen = ImageDraw.Draw(picture)
        (pen.ellipse if index % 3 else pen.rectangle)(box, outline=(120, 20, 30), width=max(size // 16, 1))
        picture.save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text("a ring" if index % 3 else "a frame")
    return folder


def save_sdxl_shaped(folder):
    """A random checkpoint of toy size whose U-Net wants SDXL's time ids and pooled embedding, and predicts noise."""
    sdxl = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
    sdxl["projection_class_embeddings_input_dim"] = DG + 6 * 4
    model, processor = make_model(), make_processor()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    make_pipeline(unet=sdxl).save_pretrained(folder)
    return folder


def run(base, look, output, steps, *flags):
    words = ["--model_name_or_path", str(base), "--data", str(look), "--output_dir", str(output), "--max_steps", steps]
    return lora_decoder.main([*words, *SMALL, *flags])


def weights(folder):
    return load_file(folder / WEIGHTS)


def picture_of(pipe, source):
    options = {"generator": torch.Generator().manual_seed(0), "output_type": "pt", "num_inference_steps": 3}
    return pipe.reconstruct([str(source)], **options).images


@pytest.fixture(scope="module")
def look(tmp_path_factory):
    return write_look(tmp_path_factory.mktemp("look") / "data")


@pytest.fixture(scope="module")
def adapter(look, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter") / "out"
    run(ROOT / "pisces-tiny", look, folder, "8", "--keep", str(look))
    return folder


def test_the_adapter_is_diffusers_own_file_and_learned_something(adapter):
    names = weights(adapter)
    assert all(name.startswith("unet.") and ".lora_" in name for name in names)
    assert any(".conv1.lora_A" in name for name in names) and any(".to_q.lora_A" in name for name in names)
    assert max(float(value.abs().max()) for name, value in names.items() if "lora_B" in name) > 1e-3
    results = json.loads((adapter / "results.json").read_text())
    assert set(results["metrics"]) == {
        *("heldout_psnr_before", "heldout_psnr", "kept_psnr_before", "kept_psnr", "heldout_psnr_autoencoder")
    }
    losses = [point["loss"] for point in results["curve"] if "loss" in point]
    assert len(losses) == 8 and sum(losses[-3:]) < sum(losses[:3])


def test_the_adapter_goes_on_comes_off_is_fused_and_swapped(adapter, look):
    pipe = PiscesPipeline.from_pretrained(ROOT / "pisces-tiny")
    pipe.set_progress_bar_config(disable=True)
    base = picture_of(pipe, look / "0.png")
    pipe.load_lora_weights(adapter, adapter_name="look")
    on = picture_of(pipe, look / "0.png")
    assert not torch.allclose(on, base, atol=1e-3)
    pipe.disable_lora()
    assert torch.equal(picture_of(pipe, look / "0.png"), base)
    pipe.unload_lora_weights()
    assert torch.equal(picture_of(pipe, look / "0.png"), base)
    pipe.load_lora_weights(adapter, adapter_name="look")
    pipe.fuse_lora()
    torch.testing.assert_close(picture_of(pipe, look / "0.png"), on, atol=1e-3, rtol=0)
    pipe.unfuse_lora()
    half = {name: value * 0.5 if "lora_B" in name else value for name, value in weights(adapter).items()}
    pipe.load_lora_weights(half, adapter_name="weaker")
    pipe.set_adapters(["weaker"])
    swapped = picture_of(pipe, look / "0.png")
    pipe.set_adapters(["look"], adapter_weights=[0.5])
    torch.testing.assert_close(swapped, picture_of(pipe, look / "0.png"), atol=1e-4, rtol=0)


def test_the_measured_pictures_are_those_of_the_saved_adapter(adapter, look):
    told = json.loads((adapter / "results.json").read_text())["metrics"]
    fresh = DecoderLora(str(ROOT / "pisces-tiny"))
    heldout = load_pictures(adapter / "pictures" / "heldout")
    assert round(fresh.measure(heldout, None, 2)["heldout"].psnr, 2) == told["heldout_psnr_before"]
    fresh.pipe.load_lora_weights(adapter)
    assert fresh.measure(heldout, None, 2)["heldout"].psnr == pytest.approx(told["heldout_psnr"], abs=0.02)


@pytest.mark.slow
def test_a_stopped_run_ends_with_the_weights_of_a_whole_one(adapter, look, tmp_path, monkeypatch):
    save = trainer.WholeCheckpoints._save_checkpoint

    def save_and_stop(self, *args, **kwargs):
        save(self, *args, **kwargs)
        raise KeyboardInterrupt

    output = tmp_path / "out"
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(trainer.WholeCheckpoints, "_save_checkpoint", save_and_stop)
        run(ROOT / "pisces-tiny", look, output, "8", "--keep", str(look))
    saved = load_file(output / "checkpoints" / "checkpoint-4" / "model.safetensors")
    assert saved and all("lora_" in name for name in saved)  # a checkpoint of the adapter alone
    with pytest.raises(UsageError, match=r"train: lora_r is 2, but the step was begun with 4 in .*Set it back"):
        run(ROOT / "pisces-tiny", look, output, "8", "--keep", str(look), "--lora_r", "2")
    run(ROOT / "pisces-tiny", look, output, "8", "--keep", str(look))
    one, other = weights(adapter), weights(output)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_decoder_of_sdxls_shape_is_trained_by_the_same_command(look, tmp_path):
    base = save_sdxl_shaped(tmp_path / "sdxl")
    run(base, look, tmp_path / "out", "8")
    losses = [p["loss"] for p in json.loads((tmp_path / "out/results.json").read_text())["curve"] if "loss" in p]
    assert sum(losses[-3:]) < sum(losses[:3])
    pipe = PiscesPipeline.from_pretrained(base)
    before = picture_of(pipe, look / "0.png")
    pipe.load_lora_weights(tmp_path / "out")
    assert not torch.equal(picture_of(pipe, look / "0.png"), before)
    pipe.disable_lora()
    assert torch.equal(picture_of(pipe, look / "0.png"), before)


def test_attention_alone_has_fewer_updates_and_a_poor_autoencoder_is_named(look, tmp_path, capsys):
    run(ROOT / "pisces-tiny", look, tmp_path / "out", "1", "--targets", "attention")
    assert all(".attn" in name for name in weights(tmp_path / "out"))
    ceiling = json.loads((tmp_path / "out/results.json").read_text())["metrics"]["heldout_psnr_autoencoder"]
    assert ceiling < 22  # pisces-tiny has never seen coloured paper
    assert f"Warning: the autoencoder alone reaches {ceiling} dB on these pictures" in capsys.readouterr().out


def test_where_the_autoencoder_is_poor_it_is_taught_latents_that_it_paints_better(look):
    decoder_lora = DecoderLora(str(ROOT / "pisces-tiny"))
    pictures = load_pictures([str(look)], 64, folder=look.parent / "prepared").pictures
    shown = to_pixel_values(pictures)
    own, vectors = decoder_lora.encode(pictures)
    fitted, same = decoder_lora.encode(pictures, latent_steps=6)
    assert torch.equal(vectors, same) and not torch.equal(own, fitted)
    scale = decoder_lora.pipe.vae.config.scaling_factor
    with torch.no_grad():
        errors = [(decoder_lora.pipe.vae.decode(z / scale).sample - shown).square().mean() for z in (own, fitted)]
    assert errors[1] < 0.8 * errors[0]
    assert torch.equal(decoder_lora.fit_latents(own, shown, 0), own)
    assert not any(parameter.requires_grad for parameter in decoder_lora.pipe.vae.parameters())


def test_latents_are_fitted_only_where_the_autoencoder_is_poor(look, monkeypatch):
    decoder_lora = DecoderLora(str(ROOT / "pisces-tiny"))
    data, asked = load_pictures([str(look)], 64, folder=look.parent / "prepared"), []
    encode = decoder_lora.encode
    monkeypatch.setattr(decoder_lora, "encode", lambda *a, latent_steps=0: (asked.append(latent_steps), encode(*a))[1])
    decoder_lora.training_model(4, "attention", 0.0, 0.0)
    for ceiling in (21.9, 22.0):
        monkeypatch.setattr(decoder_lora, "ceiling", lambda pictures, ceiling=ceiling: ceiling)
        decoder_lora.rows(data, None, 0.4, latent_steps=6)
    assert asked == [6, 0]


def test_what_cannot_be_trained_or_pushed_is_refused(look, tmp_path):
    with pytest.raises(UsageError, match="--model_name_or_path is missing"):
        lora_decoder.main(["--data", str(look), "--output_dir", str(tmp_path)])
    push = ["--push_to_hub", "true"]
    with pytest.raises(UsageError, match="--push_to_hub needs --hub_model_id OWNER/NAME"):
        run(ROOT / "pisces-tiny", look, tmp_path / "out", "1", *push)
    with pytest.raises(UsageError, match=r"is a folder of this machine. Add --base_model_id"):
        run(ROOT / "pisces-tiny", look, tmp_path / "out", "1", *push, "--hub_model_id", "me/look")
    with pytest.raises(UsageError, match="--lora_r 0: expected a number from 1 to 1024"):
        run(ROOT / "pisces-tiny", look, tmp_path / "out", "1", "--lora_r", "0")
    assert not (tmp_path / "out").exists()


def test_a_push_is_one_private_commit_of_weights_and_card(adapter, monkeypatch):
    with HubServer() as hub:
        hub.redirect(monkeypatch)
        url = push_adapter(adapter, "me/look", "none", True)
        (commit,) = hub.commits("me/look")
        repo = hub.repos["me/look"]
    assert repo.private and "me/look" in url
    assert {WEIGHTS, "README.md", "run.yaml", "sheet.png"} <= set(commit.files)
    assert not any("checkpoint" in name or name.endswith(".bin") for name in commit.files)
    assert b"pipe.load_lora_weights" in commit.files["README.md"]


@pytest.mark.slow
def test_the_small_decoder_is_trained_on_as_a_whole_and_finished_into_a_model(look, tmp_path):
    from finetune.parts.assemble import finish

    tiny = ROOT / "pisces-tiny"
    common = ["--data", str(look), "--checkpoint", str(tiny), "--max_steps", "2", "--batch_size", "4"]
    decoder.main([*common, "--part", "unet", "--output", str(tmp_path / "mine" / "unet"), "--num_sampling_steps", "2"])
    decoder.main([*common, "--part", "vae", "--output", str(tmp_path / "mine" / "vae")])
    finish(tiny, tmp_path / "mine", tmp_path / "model")
    old, new = (load_file(f / "vae/diffusion_pytorch_model.safetensors") for f in (tiny, tmp_path / "model"))
    changed = {name.split(".")[0] for name in old if not torch.equal(old[name], new[name])}
    assert changed <= {"decoder", "post_quant_conv"} and "decoder" in changed  # latents mean what they meant
    unet = load_file(tmp_path / "model/unet/diffusion_pytorch_model.safetensors")
    base = load_file(tiny / "unet/diffusion_pytorch_model.safetensors")
    assert unet.keys() == base.keys() and not all(torch.equal(unet[name], base[name]) for name in base)
    assert PiscesPipeline.from_pretrained(tmp_path / "model")("a star", num_inference_steps=2).images[0].size == (
        64,
        64,
    )

"""Stage 0 of pisces-tiny in miniature: every recipe learns, resumes exactly, and leaves what its reader expects."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, Dinov2Config, SiglipVisionConfig, SiglipVisionModel

from finetune.parts import gen_encoder as gen_encoder_recipe
from finetune.parts import vision as vision_recipe
from finetune.parts.captioned import load_pictures, prepare
from finetune.parts.contrast import SigmoidMatch, caption_phrases, phrase_ids
from finetune.parts.gen_encoder import grid_positions
from finetune.parts.pictures import TensorRows, edge_strength, shift_pictures, to_pixel_values, to_uint8
from finetune.parts.trainer import RunArguments, WeightAverage, train
from finetune.parts.whitening import pooled_vectors, whiten_output
from finetune.scenes.labels import patch_labels
from finetune.scenes.render import main as write_scenes
from modeling_pisces.configuration_pisces import PiscesGenVisionConfig
from modeling_pisces.modeling_pisces_gen_vision import PiscesGenVisionModel
from pisces_commands.arguments import UsageError
from pisces_commands.measurement import describe_hardware


latents_of = pytest.importorskip("finetune.parts.latents", reason="the decoder's recipe needs diffusers")
decoder_recipe = pytest.importorskip("finetune.parts.decoder", reason="the decoder's recipe needs diffusers")

NUM_SCENES = 32
SMALL_RUN = [
    "--batch_size",
    "8",
    "--log_steps",
    "1",
    "--warmup_steps",
    "2",
    "--ema_decay",
    "0.5",
    "--learning_rate",
    "3e-3",
]
SMALL_TOWER = ["--hidden_size", "32", "--num_hidden_layers", "1"]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """A data folder of 32 scenes."""
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(["--output", str(folder), "--num_scenes", str(NUM_SCENES)])
    return prepare(folder, None, tmp_path_factory.mktemp("prepared") / "scenes")


@pytest.fixture(scope="module")
def gen_encoder(scenes, tmp_path_factory):
    """The folder that the generation encoder's recipe leaves after 30 steps."""
    return run_recipe(gen_encoder_recipe, scenes, tmp_path_factory.mktemp("gen_encoder"), "30", *SMALL_TOWER)


@pytest.fixture(scope="module")
def decoder(scenes, gen_encoder, tmp_path_factory):
    """A decoder folder with `vae`, `unet` and `scheduler`, after some steps each."""
    folder = tmp_path_factory.mktemp("decoder")
    sizes = ["--vae_channels", "8", "16", "16", "--unet_channels", "16", "32", "--num_sampling_steps", "2"]
    vae = run_recipe(decoder_recipe, scenes, folder / "vae", "12", "--part", "vae", *sizes)
    parts = ["--gen_encoder", str(gen_encoder), "--vae", str(vae)]
    run_recipe(decoder_recipe, scenes, folder / "unet", "30", "--part", "unet", *parts, *sizes)
    return folder


def run_recipe(recipe, scenes, output, max_steps, *flags):
    recipe.main(["--data", str(scenes), "--output", str(output), "--max_steps", max_steps, *SMALL_RUN, *flags])
    return output


def losses_of(folder):
    curve = json.loads((folder / "results.json").read_text())["curve"]
    return [point["loss"] for point in curve if "loss" in point]


def assert_learned(folder):
    losses = losses_of(folder)
    start, end = np.mean(losses[:3]), np.mean(losses[-len(losses) // 3 :])
    assert end < 0.9 * start, f"{start:.3f} -> {end:.3f}"


def test_gen_encoder_recipe_learns(gen_encoder):
    assert_learned(gen_encoder)


def test_vae_recipe_learns(decoder):
    assert_learned(decoder / "vae")


def test_unet_recipe_learns(decoder):
    assert_learned(decoder / "unet")


def test_vision_recipe_learns_and_saves_a_stock_tower_without_a_head(scenes, tmp_path):
    run_recipe(vision_recipe, scenes, tmp_path, "30", "--labels", "scenes", *SMALL_TOWER)
    assert_learned(tmp_path)
    tower = SiglipVisionModel.from_pretrained(tmp_path)
    assert tower(torch.zeros(2, 3, 64, 64)).last_hidden_state.shape == (2, 64, 32)
    assert not [name for name in tower.state_dict() if "head" in name]


def test_the_understanding_tower_learns_from_captions_alone(scenes, tmp_path):
    run_recipe(vision_recipe, scenes, tmp_path, "30", "--max_shift", "0.05", *SMALL_TOWER)
    assert_learned(tmp_path)
    metrics = json.loads((tmp_path / "results.json").read_text())["metrics"]
    assert set(metrics) == {"caption_of_picture_accuracy", "picture_of_caption_accuracy"}


def test_labels_need_a_truth_and_say_what_to_leave_out(tmp_path):
    for name in ("a", "b"):
        Image.new("RGB", (16, 16)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(name)
    with pytest.raises(UsageError, match=r"2 of 2 pictures have no truth, the first is a. Leave --labels out"):
        run_recipe(vision_recipe, tmp_path, tmp_path / "out", "1", "--labels", "scenes")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--hidden_size", "48"], "--hidden_size 48: expected a multiple of 32"),
        (["--patch_size", "7"], "--patch_size 7: pictures of 64 pixels are not whole patches"),
        (["--pool_stride", "3"], "--pool_stride 3: expected a divisor of 8"),
    ],
)
def test_a_tower_that_cannot_be_is_refused(scenes, tmp_path, flags, message):
    with pytest.raises(UsageError, match=message):
        run_recipe(gen_encoder_recipe, scenes, tmp_path, "1", *flags)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--vae_channels", "8", "12"], r"--vae_channels \[8, 12\]: expected two or more multiples of 8"),
        (["--unet_channels", "64"], r"--unet_channels \[64\]: expected two or more multiples of 16"),
        (["--vae_channels", *(["8"] * 7)], "halve a side 7 times, but pictures of 64 pixels are no multiple of 128"),
    ],
)
def test_levels_that_cannot_be_are_refused(scenes, tmp_path, flags, message):
    with pytest.raises(UsageError, match=message):
        run_recipe(decoder_recipe, scenes, tmp_path, "1", "--part", "vae", *flags)


def test_the_sigmoid_loss_judges_every_pair_and_knows_shared_captions():
    torch.manual_seed(0)
    match = SigmoidMatch(8)
    pictures, phrases = torch.randn(3, 8), caption_phrases([["a cat"], ["a dog"], ["a cat"]])[:, 0]
    scores, expected = match.score(pictures, phrases).detach(), 0.0
    for row, first in enumerate(("cat", "dog", "cat")):
        for column, second in enumerate(("cat", "dog", "cat")):
            sign = 1 if first == second else -1
            expected += float(torch.log1p(torch.exp(-sign * scores[row, column]))) / 3
    assert float(match(pictures, phrases)) == pytest.approx(expected, rel=1e-5)
    assert torch.allclose(scores[:, 0], scores[:, 2])


def test_phrases_of_signs_without_blanks_share_what_they_share():
    assert set(phrase_ids("\u8d64\u3044\u661f")) & set(phrase_ids("\u9752\u3044\u661f"))
    several = caption_phrases([["one", "the longer one"], []], num_captions=3)
    assert torch.equal(several[0, 0], several[0, 2]) and not torch.equal(several[0, 0], several[0, 1])
    assert several[1].sum() == 0


def test_pictures_are_moved_and_zoomed_by_no_more_than_asked():
    picture = torch.full((8, 3, 40, 40), 255, dtype=torch.uint8)
    picture[..., 15:25, 15:25] = 0
    assert shift_pictures(picture, 0.0) is picture
    moved = shift_pictures(picture, 0.05)
    assert moved.dtype == torch.uint8 and not torch.equal(moved, picture)
    assert len({tuple(one.flatten().tolist()) for one in moved}) == 8  # each in its own way
    assert (
        moved[..., 18:22, 18:22] == 0
    ).all()  # a square of 10, moved by 2 and zoomed by a twentieth, still covers this
    assert (moved[..., :8, :] == 255).all() and (moved[..., -8:] == 255).all()


def test_results_tell_how_the_run_was_made(gen_encoder):
    results = json.loads((gen_encoder / "results.json").read_text())
    assert results["recipe"] == "gen_encoder"
    assert results["seed"] == 0 and results["arguments"]["max_steps"] == 30
    assert results["hardware"] == describe_hardware()
    assert results["wall_time_s"] > 0 and "commit" in results and "--max_steps" not in results["metrics"]
    assert set(results["metrics"]) == {"heldout_mse", "heldout_edge_mse"}
    assert [point["step"] for point in results["curve"] if "loss" in point] == list(range(1, 31))


def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(scenes, tmp_path):
    run_recipe(vision_recipe, scenes, tmp_path, "6", "--save_steps", "3", *SMALL_TOWER)
    whole, losses = load_file(tmp_path / "model.safetensors"), losses_of(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "checkpoint-6")
    run_recipe(vision_recipe, scenes, tmp_path, "6", "--save_steps", "3", *SMALL_TOWER)
    resumed = load_file(tmp_path / "model.safetensors")
    assert losses_of(tmp_path) == losses
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_no_resume_starts_again(scenes, tmp_path):
    run_recipe(vision_recipe, scenes, tmp_path, "3", "--save_steps", "3", *SMALL_TOWER)
    run_recipe(vision_recipe, scenes, tmp_path, "3", "--save_steps", "3", "--no_resume", "--seed", "1", *SMALL_TOWER)
    assert [point["step"] for point in json.loads((tmp_path / "results.json").read_text())["curve"]][:2] == [1, 2]


def test_saved_vectors_have_mean_0_and_deviation_1_per_channel(scenes, gen_encoder):
    tower = PiscesGenVisionModel.from_pretrained(gen_encoder)
    vectors = pooled_vectors(tower, load_pictures(scenes).pictures, stride=2)
    assert vectors.shape == (NUM_SCENES, 16, 32)
    std, mean = torch.std_mean(vectors.flatten(0, 1), dim=0, correction=0)
    torch.testing.assert_close(mean, torch.zeros(32), atol=1e-5, rtol=0)  # fp32 rounding, worst seen 1.4e-6
    torch.testing.assert_close(std, torch.ones(32), atol=1e-5, rtol=0)


def test_whitening_is_the_standardisation_of_the_old_vectors(scenes):
    tower = make_tower(output_size=8)
    pictures = load_pictures(scenes).pictures
    before = pooled_vectors(tower, pictures, stride=2)
    whiten_output(tower, pictures, stride=2)
    std, mean = torch.std_mean(before, dim=(0, 1), correction=0)
    torch.testing.assert_close(pooled_vectors(tower, pictures, stride=2), (before - mean) / std, atol=1e-4, rtol=0)


def test_a_siglip_tower_is_whitened_in_its_last_norm(scenes):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    tower = SiglipVisionModel(SiglipVisionConfig(image_size=64, patch_size=8, vision_use_head=False, **sizes))
    pictures = load_pictures(scenes).pictures
    before = pooled_vectors(tower, pictures, stride=4)
    whiten_output(tower, pictures, stride=4)
    std, mean = torch.std_mean(before, dim=(0, 1), correction=0)
    torch.testing.assert_close(pooled_vectors(tower, pictures, stride=4), (before - mean) / std, atol=1e-3, rtol=0)


def test_a_tower_that_ends_otherwise_cannot_be_whitened():
    tower = AutoModel.from_config(Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2))
    with pytest.raises(ValueError, match="Dinov2Model ends in neither an output_projection nor a post_layernorm"):
        whiten_output(tower, torch.zeros(2, 3, 64, 64, dtype=torch.uint8), stride=2)


def make_tower(**overrides):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"image_size": 64, "patch_size": 8, "use_class_token": False, "norm_position": "pre"}
    return PiscesGenVisionModel(PiscesGenVisionConfig(**sizes | overrides))


def test_whitening_without_a_projection_says_what_to_set():
    with pytest.raises(ValueError, match=r"output_size None, so there is no projection to fold into. Set output_size"):
        whiten_output(make_tower(output_size=None), torch.zeros(2, 3, 64, 64, dtype=torch.uint8), stride=2)


def test_whitening_names_a_constant_channel():
    tower = make_tower(output_size=4)
    tower.output_projection.weight.data[2] = 0
    pictures = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    with pytest.raises(ValueError, match="channel 2 of the vectors is constant over 4 pictures"):
        whiten_output(tower, pictures, stride=2)


def test_whitened_latents_reconstruct_as_before(scenes):
    torch.manual_seed(0)
    vae = latents_of.build_vae([8, 16, 16], image_size=64).eval()
    pictures = load_pictures(scenes).pictures
    with torch.no_grad():
        before = vae(to_pixel_values(pictures)).sample
        old = vae.encode(to_pixel_values(pictures)).latent_dist
        latents_of.whiten_latents(vae, pictures)
        after = vae(to_pixel_values(pictures)).sample
        new = vae.encode(to_pixel_values(pictures)).latent_dist
    latents = latents_of.encode_latents(vae, pictures)
    assert latents.shape == (NUM_SCENES, 4, 16, 16)
    std, mean = torch.std_mean(latents, dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(mean, torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(std, torch.ones(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(after, before, atol=1e-4, rtol=0)  # fp32 rounding, seen 5e-6
    # the posterior keeps its width relative to its mean
    scale = old.mean.std(dim=(0, 2, 3), correction=0)[None, :, None, None]
    torch.testing.assert_close(new.std * scale, old.std, atol=1e-4, rtol=1e-4)


def test_the_decoder_folder_loads_and_samples_pictures(scenes, gen_encoder, decoder):
    diffusers = pytest.importorskip("diffusers")
    unet = diffusers.UNet2DConditionModel.from_pretrained(decoder / "unet")
    vae = diffusers.AutoencoderKL.from_pretrained(decoder / "vae")
    scheduler = diffusers.DDIMScheduler.from_pretrained(decoder / "scheduler")
    assert scheduler.config.prediction_type == "v_prediction" and scheduler.config.timestep_spacing == "trailing"
    assert float(scheduler.alphas_cumprod[-1]) == 0.0  # the last step holds no signal at all
    tower = PiscesGenVisionModel.from_pretrained(gen_encoder)
    vectors = pooled_vectors(tower, load_pictures(scenes, limit=3).pictures, stride=2)
    run = decoder_recipe.DecoderArguments(data="", output="", num_sampling_steps=2)
    latents = decoder_recipe.UNetTraining(unet.eval(), scheduler, run).sample(vectors)
    assert latents.shape == (3, 4, 16, 16)
    assert vae.decode(latents / vae.config.scaling_factor).sample.shape == (3, 3, 64, 64)


def test_parts_that_build_on_others_say_which_folder_is_missing(scenes, tmp_path):
    with pytest.raises(ValueError, match="--part unet needs --gen_encoder, the folder that"):
        run_recipe(decoder_recipe, scenes, tmp_path, "1", "--part", "unet")
    with pytest.raises(ValueError, match="--part unet needs --vae, the folder that --part vae wrote"):
        run_recipe(decoder_recipe, scenes, tmp_path, "1", "--part", "unet", "--gen_encoder", str(tmp_path))


def test_pixels_survive_the_way_to_values_and_back():
    every_level = torch.arange(256, dtype=torch.uint8)
    values = to_pixel_values(every_level)
    assert values[0] == -1 and values[-1] == 1
    assert torch.equal(to_uint8(values), every_level)
    assert to_uint8(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]


def test_edges_are_strong_within_two_pixels_of_a_step_and_zero_elsewhere():
    picture = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    picture[:, 1, :, 8:] = 100  # one channel is enough
    row = edge_strength(picture)[0, 0, 5]
    assert row.tolist() == [0] * 6 + [100] * 4 + [0] * 6


def test_patch_labels_of_a_hand_made_scene():
    item = {
        "shape": "square",
        "color": "orange",
        "size": "large",
        "row": 0,
        "col": 2,
        "x": 52.0,
        "y": 12.0,
        "radius": 9,
    }
    labels = patch_labels([{"objects": [item]}], grid_side=8)
    shapes = labels["shape"].view(8, 8)
    # 0.8 radii are 7.2: patches that come nearer than that to (52, 12) lie in rows 0 to 2 and columns 5 to 7
    assert torch.nonzero(shapes.sum(1)).flatten().tolist() == [0, 1, 2]
    assert torch.nonzero(shapes.sum(0)).flatten().tolist() == [5, 6, 7]
    assert shapes[1, 6] == 2 and labels["color"].view(8, 8)[1, 6] == 2
    assert labels["size"].view(8, 8)[1, 6] == 1 and labels["place"].view(8, 8)[1, 6] == 3
    assert shapes[4, 2] == 0


def test_phrases_tell_which_colour_belongs_to_which_shape():
    straight, crossed = phrase_ids("A red star and a blue heart."), phrase_ids("a blue star and a red heart")
    assert set(straight) != set(crossed)
    assert phrase_ids("A red star.") == phrase_ids("a red star")
    assert 0 not in straight  # 0 is padding


def test_grid_positions_are_all_different():
    positions = grid_positions(8, 32)
    distances = torch.cdist(positions, positions) + 9 * torch.eye(64)
    assert distances.min() > 0.3


def test_the_average_follows_the_weights_and_swaps_back():
    layer = torch.nn.Linear(1, 1, bias=False)
    layer.weight.data.fill_(0.0)
    average = WeightAverage(layer, decay=0.75)
    layer.weight.data.fill_(1.0)
    state = type("State", (), {"global_step": 1000})
    average.on_step_end(None, state, None)
    with average.in_use():
        assert layer.weight.item() == pytest.approx(0.25)
    assert layer.weight.item() == 1.0


def test_columns_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match=r"different lengths {'a': 2, 'b': 3}"):
        TensorRows(a=torch.zeros(2), b=torch.zeros(3))


def test_fewer_pictures_than_a_batch_are_refused(tmp_path):
    run = RunArguments(data="", output=str(tmp_path), batch_size=8)
    with pytest.raises(ValueError, match=r"5 pictures do not fill one batch of 8. Lower --batch_size"):
        train(torch.nn.Linear(1, 1), TensorRows(a=torch.zeros(5)), run)


def test_a_part_goes_on_as_it_began_or_says_why_not(scenes, tmp_path):
    run_recipe(vision_recipe, scenes, tmp_path, "4", "--save_steps", "2", *SMALL_TOWER)
    weights, losses = load_file(tmp_path / "model.safetensors"), losses_of(tmp_path)
    with pytest.raises(ValueError, match=r"was begun with other settings: learning_rate 0\.003, now 0\.001\."):
        run_recipe(vision_recipe, scenes, tmp_path, "6", "--learning_rate", "0.001", *SMALL_TOWER)
    with pytest.raises(ValueError, match="seed 0, now 1"):
        run_recipe(vision_recipe, scenes, tmp_path, "6", "--seed", "1", *SMALL_TOWER)
    run_recipe(vision_recipe, scenes, tmp_path, "4", "--save_steps", "3", *SMALL_TOWER)  # nothing is left to train
    assert losses_of(tmp_path) == losses
    again = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(again[name], value) for name, value in weights.items())

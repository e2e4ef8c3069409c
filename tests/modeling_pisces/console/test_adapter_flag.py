"""Claims about `--adapter`: every command takes it, what it changes is what PEFT and diffusers would change."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file

from modeling_pisces.checkpoint.adapters import attach_adapters, attach_choices, find_adapter, find_model, is_adapter
from modeling_pisces.checkpoint.loading import load_model, load_pipeline
from pisces_commands.console import main
from tests.checkpoint_folder import write_checkpoint


pytest.importorskip("diffusers")
TARGETS = r"model\.language_model\..+\.(q_proj|v_proj|down_proj)"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def fill(module, seed):
    """LoRA begins as nothing; give its second half numbers, so that it changes what the model does."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)


def save_model_adapter(checkpoint, folder, seed=0, **options):
    model, _ = load_model(checkpoint)
    peft_model = get_peft_model(model, LoraConfig(r=4, target_modules=TARGETS, **options))
    fill(peft_model, seed)
    peft_model.save_pretrained(folder)
    return folder


def save_decoder_adapter(checkpoint, folder, seed=1):
    pipeline = load_pipeline(checkpoint)
    pipeline.unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v"]))
    fill(pipeline.unet, seed)
    pipeline.save_lora_weights(folder, get_peft_model_state_dict(pipeline.unet))
    return folder


@pytest.fixture(scope="module")
def adapters(checkpoint, tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    both = shutil.copytree(save_model_adapter(checkpoint, root / "words"), root / "both")
    shutil.copytree(save_decoder_adapter(checkpoint, root / "pixels"), both, dirs_exist_ok=True)
    save_model_adapter(checkpoint, root / "more", seed=2)
    return root


def run(capsys, *arguments):
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def draw(capsys, checkpoint, out, *more):
    code, output, errors = run(capsys, "draw", "a box", "--model", checkpoint, "--output", out, "--json", *more)
    assert code == 0, errors
    return {r.get("adapter", ""): Image.open(r["path"]).tobytes() for r in json.loads(output)["results"]}, errors


def test_draw_draws_with_the_adapter_as_peft_would(checkpoint, adapters, tmp_path, capsys):
    plain, _ = draw(capsys, checkpoint, tmp_path / "plain")
    adapted, _ = draw(capsys, checkpoint, tmp_path / "adapted", "--adapter", adapters / "words")
    assert adapted != plain
    pipeline = load_pipeline(checkpoint)
    PeftModel.from_pretrained(pipeline.vision_language_model, adapters / "words")
    expected = pipeline(["a box"], generator=[torch.Generator().manual_seed(0)]).images[0]
    assert adapted[""] == expected.tobytes()


def test_draw_takes_an_adapter_of_the_decoder_and_both_add_up(checkpoint, adapters, tmp_path, capsys):
    found = [
        draw(
            capsys, checkpoint, tmp_path / str(number), *(word for n in names for word in ("--adapter", adapters / n))
        )[0][""]
        for number, names in enumerate(
            [(), ("words",), ("pixels",), ("words", "pixels"), ("both",), ("words", "more")]
        )
    ]
    plain, words, pixels, two, both, more = found
    assert len({plain, words, pixels, two, more}) == 5 and two == both


def test_several_adapters_of_the_language_model_add_their_changes(checkpoint, adapters):
    model, _ = load_model(checkpoint)
    layer = model.model.language_model.layers[0].self_attn.q_proj
    x, base = torch.randn(1, layer.in_features), layer.weight.detach().clone()
    attach_adapters([find_adapter(str(adapters / name)) for name in ("words", "more")], model)
    found = model.model.language_model.layers[0].self_attn.q_proj(x)
    expected = x @ base.T + layer.bias if layer.bias is not None else x @ base.T
    for name in ("words", "more"):
        tensors = load_file(adapters / name / "adapter_model.safetensors")
        a, b = (
            next(v for k, v in tensors.items() if f"layers.0.self_attn.q_proj.lora_{letter}" in k) for letter in "AB"
        )
        expected = expected + x @ a.T @ b.T * 8 / 4
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_compare_draws_the_same_seeds_without_and_with(checkpoint, adapters, tmp_path, capsys):
    plain, _ = draw(capsys, checkpoint, tmp_path / "plain")
    adapted, _ = draw(capsys, checkpoint, tmp_path / "adapted", "--adapter", adapters / "both")
    compared, _ = draw(capsys, checkpoint, tmp_path / "compared", "--adapter", adapters / "both", "--compare")
    assert compared == {"without adapter": plain[""], "with adapter": adapted[""]}
    sheet = Image.open(tmp_path / "compared" / "compare.png")
    assert sheet.height > 2 * 192
    assert sorted(path.name for path in (tmp_path / "compared").iterdir()) == [
        "a_box_with_adapter_0.png", "a_box_without_adapter_0.png", "compare.png",
    ]  # fmt: skip


def test_compare_needs_an_adapter(checkpoint, tmp_path, capsys):
    code, _, errors = run(capsys, "draw", "x", "--model", checkpoint, "--output", tmp_path, "--compare")
    assert code == 2 and "--compare shows what an adapter changes: name one with --adapter" in errors


def test_an_adapter_in_place_of_a_model_brings_its_base_and_says_so(checkpoint, adapters, tmp_path, capsys):
    expected, _ = draw(capsys, checkpoint, tmp_path / "one", "--adapter", adapters / "words")
    found, errors = draw(capsys, adapters / "words", tmp_path / "two")
    assert found == expected
    assert f"{adapters / 'words'} is an adapter; its base {checkpoint} is loaded with it" in errors


def test_describe_answers_with_the_adapter(checkpoint, adapters, tmp_path, capsys):
    Image.new("RGB", (20, 20), "red").save(tmp_path / "a.png")
    question = ("--model", checkpoint, "--question", "what?", "--max_new_tokens", "8")
    plain = run(capsys, "describe", tmp_path / "a.png", *question)[1]
    adapted = run(capsys, "describe", tmp_path / "a.png", *question, "--adapter", adapters / "words")[1]
    assert plain != adapted
    code, unchanged, errors = run(capsys, "describe", tmp_path / "a.png", *question, "--adapter", adapters / "pixels")
    assert code == 0 and unchanged == plain
    assert f"warning: the decoder's part of {adapters / 'pixels'} has no effect here: nothing is drawn" in errors


def test_reconstruct_uses_the_decoders_adapter_and_names_the_other(checkpoint, adapters, tmp_path, capsys):
    Image.new("RGB", (20, 20), "red").save(tmp_path / "a.png")
    pictures = []
    for name in (None, "words", "pixels"):
        more = ("--adapter", adapters / name) if name else ()
        code, _, errors = run(
            capsys,
            "reconstruct",
            tmp_path / "a.png",
            "--model",
            checkpoint,
            "--output",
            tmp_path / f"{name}.png",
            *more,
        )
        assert code == 0
        assert ("is for the language model, which has no part here" in errors) == (name == "words")
        pictures.append(Image.open(tmp_path / f"{name}.png").tobytes())
    assert pictures[0] == pictures[1] != pictures[2]


def test_info_shows_the_adapter(checkpoint, adapters, capsys):
    code, output, _ = run(capsys, "info", "--model", checkpoint, "--adapter", adapters / "both")
    assert code == 0
    assert f"adapter {adapters / 'both'}, for {checkpoint}" in output
    assert "language model  LoRA of rank 4, alpha 8; " in output and "decoder         LoRA; " in output
    info = json.loads(run(capsys, "info", adapters / "words", "--json")[1])
    assert info["path"] == str(checkpoint) and info["adapters"][0]["sides"]["language model"]["rank"] == 4


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "adapter_config.json without adapter_model.safetensors"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "no adapter. Expected adapter_config.json with"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"x"), "adapter_model.safetensors"),
        (lambda folder: change(folder, lambda name, value: value * torch.nan), "holds NaN or infinity. Train it again"),
        (lambda folder: change(folder, lambda name, value: value[:, :-1] if "lora_A" in name else value), "does not fit this checkpoint"),
        (lambda folder: change(folder, lambda name, value: value, drop="layers.0.self_attn.q_proj"), "does not fit this checkpoint"),
    ],
)  # fmt: skip
def test_a_broken_adapter_is_one_line(checkpoint, adapters, tmp_path, capsys, break_it, message):
    folder = shutil.copytree(adapters / "words", tmp_path / "broken")
    break_it(folder)
    code, output, errors = run(
        capsys, "draw", "x", "--model", checkpoint, "--output", tmp_path / "o", "--adapter", folder
    )
    assert code == 2 and output == "" and message in errors and errors.count("\n") == 1


def change(folder, function, drop=None):
    path = folder / "adapter_model.safetensors"
    tensors = {k: function(k, v).contiguous() for k, v in load_file(path).items() if drop is None or drop not in k}
    save_file(tensors, path, metadata={"format": "pt"})


def test_a_checkpoint_or_nothing_in_place_of_an_adapter_is_one_line(checkpoint, tmp_path, capsys):
    code, _, errors = run(capsys, "draw", "x", "--model", checkpoint, "--adapter", checkpoint)
    assert code == 2 and "a whole checkpoint: give it with --model" in errors
    code, _, errors = run(capsys, "draw", "x", "--model", checkpoint, "--adapter", tmp_path / "gone")
    assert code == 2 and "gone: no such folder" in errors and errors.count("\n") == 1


def test_copies_of_whole_modules_go_one_at_a_time(checkpoint, adapters, tmp_path, capsys):
    for seed, name in enumerate(("one", "two")):
        save_model_adapter(checkpoint, tmp_path / name, seed, modules_to_save=["gen_head"])
    more = [word for name in ("one", "two") for word in ("--adapter", tmp_path / name)]
    code, _, errors = run(capsys, "draw", "x", "--model", checkpoint, "--output", tmp_path / "o", *more)
    assert code == 2 and "2 adapters of the language model cannot act together" in errors


def test_an_adapter_without_its_base_says_how_to_give_both(adapters, tmp_path):
    folder = shutil.copytree(adapters / "words", tmp_path / "words")
    config = json.loads((folder / "adapter_config.json").read_text())
    for base, message in ((None, "does not name its base"), ("gone", "is an adapter for gone, which cannot be found")):
        (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
        with pytest.raises(ValueError, match=f"{message}.*--model BASE --adapter"):
            find_model(str(folder))
    (folder / "README.md").write_text("---\nbase_model: me/base\n---\n")
    (folder / "adapter_config.json").unlink()
    shutil.copy(adapters / "pixels" / "pytorch_lora_weights.safetensors", folder)
    assert find_adapter(str(folder)).base == "me/base" and is_adapter(folder)


def test_switching_off_leaves_the_base_exactly(checkpoint, adapters):
    pipeline = load_pipeline(checkpoint)
    draw = lambda: pipeline(["a box"], generator=[torch.Generator().manual_seed(0)], output_type="np").images  # noqa: E731
    plain = draw()
    attached = attach_adapters([find_adapter(str(adapters / "both"))], pipeline.vision_language_model, pipeline)
    adapted = draw()
    with attached.off():
        assert (draw() == plain).all()
    assert (draw() == adapted).all() and not (adapted == plain).all()


def test_of_several_adapters_one_is_chosen_at_a_time_and_none_is_the_base(checkpoint, adapters):
    """As the server needs them; each choice draws what the adapter alone draws, in any order."""

    def drawn(pipeline):
        return pipeline(["a box"], generator=[torch.Generator().manual_seed(1)]).images[0].tobytes()

    names = ("words", "pixels", "both", "more")
    expected = {None: drawn(load_pipeline(checkpoint))}
    for name in names:
        pipeline = load_pipeline(checkpoint)
        attach_adapters([find_adapter(str(adapters / name))], pipeline.vision_language_model, pipeline)
        expected[name] = drawn(pipeline)
    assert len(set(expected.values())) == 5
    pipeline = load_pipeline(checkpoint)
    choices = attach_choices(
        {name: find_adapter(str(adapters / name)) for name in names}, pipeline.vision_language_model, pipeline
    )
    for name in ("both", None, "pixels", "words", "more", "words", None, "both", "pixels"):
        with choices.use(name):
            assert drawn(pipeline) == expected[name], name


def test_choices_take_adapters_that_cannot_act_together(checkpoint, tmp_path):
    """Copies of whole modules go one at a time, and here they do."""
    from tests.fixtures import make_processor

    folders = [save_model_adapter(checkpoint, tmp_path / str(n), n, modules_to_save=["gen_head"]) for n in (3, 4)]
    inputs = make_processor()(text="a box", generation_mode="image", return_tensors="pt")

    def drawn(model):
        generator = torch.Generator().manual_seed(0)
        return model.generate(**inputs, generation_mode="image", generator=generator)

    model, _ = load_model(checkpoint)
    choices = attach_choices({folder.name: find_adapter(str(folder)) for folder in folders}, model)
    for folder in (*folders, folders[0]):
        alone, _ = load_model(checkpoint)
        attach_adapters([find_adapter(str(folder))], alone)
        with choices.use(folder.name):
            assert torch.equal(drawn(model), drawn(alone))
    with choices.use(None):
        assert torch.equal(drawn(model), drawn(load_model(checkpoint)[0]))

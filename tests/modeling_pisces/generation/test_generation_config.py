"""A generation config keeps every value through saving and loading, whoever wrote it and whatever flag it carries.

transformers marks a generation config that it derived from a model config, and drops the names it does not know
itself, `image_temperature` first of all, when it reads a file with that mark.
"""

import json

import pytest
from transformers import AutoModelForMultimodalLM, GenerationConfig, Trainer, TrainingArguments

from modeling_pisces.configuration_pisces import read_generation_config
from tests.fixtures import make_model, make_processor


FLAG = "_from_model_config"


def read_settings(folder) -> dict:
    return json.loads((folder / "generation_config.json").read_text())


def set_values(model, **values):
    """As finetune.parts sets its own: on the object that transformers derived from the model config."""
    model.generation_config.update(**values)
    for name, value in values.items():
        setattr(model.generation_config, name, value)
    return model


@pytest.fixture
def flagged(tmp_path):
    """A checkpoint as transformers alone writes it, with values of its own beside the flag."""
    folder = tmp_path / "flagged"
    make_model(gen_head_type="flow").save_pretrained(folder)
    make_processor().save_pretrained(folder)
    settings = read_settings(folder) | {FLAG: True, "image_temperature": 0.25, "max_new_tokens": 7}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


def test_transformers_alone_still_loses_the_values(flagged):
    """Why all this is there; when it fails, transformers has changed and the module can go."""
    assert not hasattr(GenerationConfig.from_pretrained(flagged), "image_temperature")


def test_a_saved_model_carries_no_flag_and_loads_with_its_values(tmp_path):
    model = set_values(make_model(gen_head_type="flow"), image_temperature=0.25, max_new_tokens=7)
    model.save_pretrained(tmp_path)
    assert FLAG not in read_settings(tmp_path)
    loaded = AutoModelForMultimodalLM.from_pretrained(tmp_path).generation_config
    assert (loaded.image_temperature, loaded.max_new_tokens) == (0.25, 7)
    assert loaded.eos_token_id == model.config.text_config.eos_token_id


def test_a_trainer_saves_no_flag(tmp_path):
    model = set_values(make_model(gen_head_type="flow"), image_temperature=0.25)
    Trainer(model=model, args=TrainingArguments(str(tmp_path), report_to=[])).save_model()
    assert FLAG not in read_settings(tmp_path) and read_settings(tmp_path)["image_temperature"] == 0.25


def test_a_flagged_file_is_loaded_with_every_value(flagged):
    settings = AutoModelForMultimodalLM.from_pretrained(flagged).generation_config
    assert (settings.image_temperature, settings.max_new_tokens) == (0.25, 7)
    assert not settings._from_model_config
    assert settings.to_diff_dict() == read_generation_config(flagged).to_diff_dict()


def test_a_flagged_file_in_a_subfolder_is_loaded_with_every_value(flagged):
    settings = AutoModelForMultimodalLM.from_pretrained(flagged.parent, subfolder="flagged").generation_config
    assert settings.image_temperature == 0.25


def test_a_flagged_object_given_at_loading_keeps_every_value(flagged):
    given = GenerationConfig(max_new_tokens=3)
    given.image_temperature = 0.5
    given._from_model_config = True
    settings = AutoModelForMultimodalLM.from_pretrained(flagged, generation_config=given).generation_config
    assert (settings.image_temperature, settings.max_new_tokens) == (0.5, 3)


def test_without_a_file_the_model_config_still_gives_the_end_of_text(flagged):
    (flagged / "generation_config.json").unlink()
    settings = AutoModelForMultimodalLM.from_pretrained(flagged).generation_config
    assert settings.eos_token_id == make_model().config.text_config.eos_token_id is not None


def test_saving_what_was_loaded_from_a_flagged_file_takes_the_flag_out(flagged, tmp_path):
    AutoModelForMultimodalLM.from_pretrained(flagged).save_pretrained(tmp_path / "again")
    settings = read_settings(tmp_path / "again")
    assert FLAG not in settings and settings["image_temperature"] == 0.25


@pytest.mark.parametrize("kind", ["model", "folder"])
def test_an_export_carries_no_flag_and_every_value(flagged, kind, tmp_path):
    from modeling_pisces.hub.export import export_to_folder

    source = flagged if kind == "folder" else AutoModelForMultimodalLM.from_pretrained(flagged)
    output = export_to_folder(source, make_processor(), tmp_path / "export")
    settings = read_settings(output)
    assert FLAG not in settings and (settings["image_temperature"], settings["max_new_tokens"]) == (0.25, 7)


def test_what_merging_and_quantizing_carry_along_has_no_flag_and_every_value(flagged, tmp_path):
    from conversion.storage.output_folder import carry_files

    carry_files(flagged, tmp_path / "carried")
    settings = read_settings(tmp_path / "carried")
    assert FLAG not in settings and (settings["image_temperature"], settings["max_new_tokens"]) == (0.25, 7)


@pytest.mark.parametrize(("head", "expected"), [("flow", 0.3), ("mlp", None)])
def test_the_finished_pisces_tiny_ships_a_temperature_where_the_head_samples(head, expected, tmp_path):
    pytest.importorskip("diffusers")
    from finetune.parts.assemble import finish
    from tests.hub_folders import make_pipeline

    set_values(make_model(gen_head_type=head), max_new_tokens=64).save_pretrained(tmp_path / "review")
    make_processor().save_pretrained(tmp_path / "review")
    make_pipeline().save_pretrained(tmp_path / "decoder")
    finish(tmp_path / "review", tmp_path / "decoder", tmp_path / "finished")
    assert FLAG not in read_settings(tmp_path / "finished")
    loaded = AutoModelForMultimodalLM.from_pretrained(tmp_path / "finished").generation_config
    assert getattr(loaded, "image_temperature", None) == expected and loaded.max_new_tokens == 64


def test_an_export_of_a_folder_without_the_file_carries_no_flag(flagged, tmp_path):
    from modeling_pisces.hub.export import export_to_folder

    (flagged / "generation_config.json").unlink()
    settings = read_settings(export_to_folder(flagged, make_processor(), tmp_path / "export"))
    assert FLAG not in settings and settings["eos_token_id"] == make_model().config.text_config.eos_token_id


def test_a_model_made_of_weights_alone_loads_without_a_folder():
    model = make_model()
    loaded = type(model).from_pretrained(None, config=model.config, state_dict=model.state_dict())
    assert loaded.generation_config.eos_token_id == model.generation_config.eos_token_id
    assert not getattr(loaded.generation_config, FLAG)

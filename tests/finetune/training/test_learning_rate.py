"""Claims about `--learning_rate auto`: the rule, where it is read, and the warning far above it."""

import logging
from types import SimpleNamespace

import pytest
import yaml

from finetune import lora_generation
from finetune.flags.ranges import AUTO
from finetune.training.learning_rate import rule_of_thumb, settle_learning_rate
from finetune.training.recipe import RecipeArguments, parse_flags
from finetune.training.sft_config import PiscesSFTConfig
from tests.finetune.lora_fixtures import make_adapted, make_rows, make_trainer, save_checkpoint, save_rows


def test_the_rule_is_the_published_one():
    """5e-5 * 10 * (2000 / width) ** 0.781, to two digits, worked out by hand for three widths."""
    assert rule_of_thumb(2000) == 5e-4
    assert rule_of_thumb(4096) == 2.9e-4  # Llama-3.1-8B: 5e-4 * 0.5713
    assert rule_of_thumb(192) == 3.1e-3  # pisces-tiny: 5e-4 * 6.23


def test_a_language_model_below_the_fit_takes_what_the_fit_s_narrowest_takes():
    assert rule_of_thumb(576, speaks=True) == rule_of_thumb(2048, speaks=True) == rule_of_thumb(2048) == 4.9e-4
    assert rule_of_thumb(4096, speaks=True) == rule_of_thumb(4096)


def test_whole_matrices_and_preferences_take_less():
    assert rule_of_thumb(2000, "full") == 2.5e-4
    assert rule_of_thumb(2000, preferences=True) == 2.5e-5


def settle(rate, width=4096, flavour="portable", new_token_ids=None):
    training = SimpleNamespace(learning_rate=rate, process_index=0)
    config = SimpleNamespace(text_config=SimpleNamespace(hidden_size=width), new_token_ids=new_token_ids)
    model = SimpleNamespace(config=config)
    settle_learning_rate(training, model, flavour)
    return training.learning_rate


def test_auto_becomes_the_rule_and_is_printed(capsys):
    assert settle(AUTO) == 2.9e-4
    assert "learning rate 0.00029: the rule for a width of 4096, flavour portable" in capsys.readouterr().out


def test_a_value_of_the_user_stays_and_stands_beside_the_rule(capsys, caplog):
    with caplog.at_level(logging.WARNING):
        assert settle(1e-4) == 1e-4
    assert "learning rate 0.0001; the rule for a width of 4096 is 0.00029" in capsys.readouterr().out
    assert not caplog.records


def test_a_value_far_above_the_rule_warns(caplog):
    with caplog.at_level(logging.WARNING):
        settle(2e-3)  # what the configs of pisces-tiny once had
    (record,) = caplog.records
    assert "--learning_rate 0.002 is 6.9 times the 0.00029 that fits" in record.message
    assert "Use --learning_rate auto" in record.message


def test_new_tokens_say_that_the_checkpoint_is_a_language_model(caplog):
    assert settle(AUTO, width=576, new_token_ids=[5]) == 4.9e-4
    with caplog.at_level(logging.WARNING):
        settle(2e-3, width=576, new_token_ids=[5])
    assert "is 4.1 times the 0.00049" in caplog.records[0].message


@pytest.mark.parametrize("words", [["--learning_rate", "auto"], ["--learning_rate=auto"], []])
def test_auto_is_read_from_flags_and_is_the_default(words, tmp_path):
    flags = ["--model_name_or_path", "x", "--data", "y", "--output_dir", str(tmp_path), "--use_cpu", "True", *words]
    assert parse_flags(RecipeArguments, flags)[1].learning_rate == AUTO


def test_a_yaml_file_may_hold_auto_and_a_flag_wins(tmp_path):
    (tmp_path / "run.yaml").write_text("learning_rate: auto\nmodel_name_or_path: x\ndata: [y]\nuse_cpu: true\n")
    flags = ["--config", str(tmp_path / "run.yaml"), "--output_dir", str(tmp_path)]
    assert parse_flags(RecipeArguments, flags)[1].learning_rate == AUTO
    assert parse_flags(RecipeArguments, [*flags, "--learning_rate", "1e-4"])[1].learning_rate == 1e-4


def test_another_word_is_refused(tmp_path, capsys):
    flags = ["--model_name_or_path", "x", "--data", "y", "--output_dir", str(tmp_path), "--learning_rate", "fast"]
    with pytest.raises(SystemExit):
        parse_flags(RecipeArguments, flags)
    assert "--learning_rate" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--learning_rate fast: expected a number above 0 to 100, or auto"):
        PiscesSFTConfig(output_dir=str(tmp_path), learning_rate="fast", use_cpu=True)


def test_a_trainer_without_a_recipe_settles_it_too(tmp_path):
    trainer = make_trainer(make_adapted(), make_rows("u"), tmp_path, learning_rate=AUTO)
    assert trainer.args.learning_rate == rule_of_thumb(32)


def test_run_yaml_has_the_value_and_the_rule(tmp_path):
    start, rows = save_checkpoint(tmp_path / "start"), save_rows(tmp_path / "rows", make_rows("d"))
    flags = ["--model_name_or_path", str(start), "--data", str(rows), "--output_dir", str(tmp_path / "out")]
    lora_generation.main([*flags, "--max_steps", "1", "--use_cpu", "True", "--flavour", "full"])
    record = yaml.safe_load((tmp_path / "out/run.yaml").read_text())
    rule = rule_of_thumb(32, "full")
    assert record["learning_rate"] == {"used": rule, "rule": rule, "width": 32}
    assert record["settings"]["training"]["learning_rate"] == rule

"""Claims about `pisces_commands.arguments.LineParser`: a flag's beginning is enough, whatever its spellings."""

import pytest

from pisces_commands.arguments import LineParser
from pisces_commands.ending import CommandEnd


def parser():
    made = LineParser(prog="python -m finetune.lora_decoder")
    made.add_argument("--output_dir", "--output-dir")
    made.add_argument("--model_name_or_path", "--model-name-or-path")
    made.add_argument("--model_revision", "--model-revision")
    return made


@pytest.mark.parametrize("words", [["--output", "a"], ["--output=a"], ["--out", "a"], ["--output-d", "a"]])
def test_the_beginning_of_a_flag_with_two_spellings_is_enough(words):
    assert parser().parse_args(words).output_dir == "a"


def test_what_could_be_two_flags_is_refused_and_each_is_named_once(capsys):
    with pytest.raises(CommandEnd) as ended:
        parser().parse_args(["--model", "a"])
    assert ended.value.code == 2
    assert (
        "ambiguous option: --model could match --model_name_or_path, --model_revision (see" in capsys.readouterr().err
    )


def test_recipes_take_the_flag_that_every_other_command_has(tmp_path):
    pytest.importorskip("trl")
    from finetune.flags.parsing import parse_classes
    from finetune.lora_decoder import LoraDecoderArguments

    words = ["--model_name_or_path", "pisces-tiny", "--data", "pictures", "--output", str(tmp_path / "out")]
    (run,) = parse_classes([LoraDecoderArguments], words)
    assert run.output_dir == str(tmp_path / "out")

"""The command's own side: tasks, checks before a run, and what is believed of a harness's files. Its harness is a stand-in."""

import json
import re
import shutil
from pathlib import Path

import pytest

from evaluation.lmms_eval_plugin.pisces_lmms_eval import answers
from evaluation.understanding import benchmark as understanding
from evaluation.understanding import harness as understanding_harness
from evaluation.understanding.harness import build_environment, last_error, probe
from evaluation.understanding.tasks import SUITE
from tests.evaluation.understanding.understanding_stand_ins import (
    PROBED,
    TASKS,
    make_plan,
    read_calls,
    save_checkpoint,
    write_fake_harness,
    write_parquet,
)


ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/evaluate_understanding.md").read_text(encoding="utf-8")
MMVP = {"mmvp_accuracy": 0.5, "mmvp_pair_accuracy": 0.25}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture
def score(checkpoint, tmp_path, capsys):
    """Run the command on a plan of the fake harness; returns the results, or the one line of its error."""

    def run(plan: dict, *flags: str, tasks: str = "mmvp"):
        python = write_fake_harness(tmp_path, plan)
        words = ["--model", str(checkpoint), "--tasks", tasks, "--output", str(tmp_path / "results.json")]
        (tmp_path / "results.json").unlink(missing_ok=True)
        try:
            understanding.main([*words, "--harness_python", str(python), *flags])
        except SystemExit as error:
            assert not (tmp_path / "results.json").exists(), "an error leaves no score"
            assert error.code in (1, 2) and "\n" not in str(error)
            return str(error).removeprefix("error: ")
        return json.loads((tmp_path / "results.json").read_text())

    return run


# ---- results


def test_a_whole_run_becomes_a_results_file_with_all_that_identifies_it(score, tmp_path, capsys):
    results = score(make_plan(TASKS["mmvp"], 300, **MMVP))
    task = results["tasks"]["mmvp"]
    assert {name: task[name] for name in ("benchmark", "metric", "value", "n", "scale", "split", "is_whole")} == {
        "benchmark": "MMVP",
        "metric": "mmvp_pair_accuracy",
        "value": 0.25,
        "n": 300,
        "scale": "0 to 1",
        "split": "train",
        "is_whole": True,
    }
    assert task["metrics"] == MMVP and task["dataset"] == "lmms-lab-eval/MMVP"
    settings = results["settings"]
    assert settings["harness"] == PROBED["versions"] and re.fullmatch(r"sha256 \w{16}", settings["weights"])
    assert settings["judge"] is None and settings["limit"] is None
    run = results["run"]
    assert (
        run["protocol"].startswith("lmms-eval 0.7.3, its prompts") and run["commit"] == run["commits_of_answers"][-1]
    )
    assert "harness_python" not in run["command"] and "--tasks mmvp" in run["command"]
    assert "mmvp_pair_accuracy     0.25, 0 to 1, 300 items" in capsys.readouterr().out
    command = read_calls(tmp_path)[1]
    assert command[command.index("--model") + 1] == "pisces" and "--log_samples" in command
    assert command[command.index("--process_docs_parallel") + 1] == "1"


def test_the_same_command_twice_gives_the_same_file_but_for_the_seconds(score):
    first, second = (score(make_plan(TASKS["mmvp"], 300, **MMVP)) for _ in range(2))
    first["run"].pop("seconds"), second["run"].pop("seconds")
    assert first == second


def test_a_share_has_an_interval_in_its_own_unit_and_other_metrics_have_none(score, monkeypatch):
    plan = make_plan(TASKS["mmmu_val"], 900, mmmu_acc=0.5)
    item = score(plan, tasks="mmmu_val")["tasks"]["mmmu_val"]
    assert (item["low"], item["high"]) == (0.4674, 0.5326)
    monkeypatch.setenv("OPENAI_API_KEY", "a key")
    plan = make_plan(TASKS["mathvista_testmini_format"], 1000, llm_as_judge_eval=50.0)
    item = score(plan, tasks="mathvista_testmini_format")["tasks"]["mathvista_testmini_format"]
    assert (item["low"], item["high"]) == (46.9069, 53.0931) and item["scale"] == "0 to 100"
    assert "low" not in score(make_plan(TASKS["mmvp"], 300, **MMVP))["tasks"]["mmvp"]


def test_a_part_of_a_task_is_labelled_as_a_part(score, capsys):
    results = score(make_plan(TASKS["mmvp"], 8, **MMVP), "--limit", "8")
    assert results["tasks"]["mmvp"]["is_whole"] is False and results["settings"]["limit"] == 8
    assert "Only the first 8 items" in results["run"]["protocol"]
    assert "not the whole task" in capsys.readouterr().out


def test_the_items_of_a_group_are_those_of_its_parts(score):
    plan = make_plan(TASKS["blink"], 2, blink_acc=0.5)
    plan["results"]["group_subtasks"] = {"blink": ["blink_a", "blink_b"]}
    plan["results"]["n-samples"] = {"blink_a": {"effective": 2}, "blink_b": {"effective": 1}}
    plan["samples"] = {"blink_a": plan["samples"]["blink"], "blink_b": plan["samples"]["blink"][:1]}
    assert score(plan, "--limit", "2", tasks="blink")["tasks"]["blink"]["n"] == 3
    plan["samples"]["blink_b"] = []
    assert "blink: 2 items, where 3 are expected" in score(plan, "--limit", "2", tasks="blink")
    assert "blink: 2 items, where 1901 are expected" in score(plan, tasks="blink")


def test_other_questions_have_another_hash_and_the_order_of_the_harness_does_not_matter(score):
    plan = make_plan(TASKS["mmvp"], 3, **MMVP)
    first = score(plan, "--limit", "3")["tasks"]["mmvp"]["items_sha256"]
    plan["samples"]["mmvp"].reverse()
    assert score(plan, "--limit", "3")["tasks"]["mmvp"]["items_sha256"] == first
    plan["samples"]["mmvp"][0]["input"] = "another question"
    assert score(plan, "--limit", "3")["tasks"]["mmvp"]["items_sha256"] != first


# ---- what the harness would score all the same


def test_half_a_data_set_is_no_score(score):
    assert "mmvp: 150 items, where 300 are expected of lmms-lab-eval/MMVP, train" in score(
        make_plan(TASKS["mmvp"], 150, **MMVP)
    )


def test_no_items_are_no_score(score):
    assert score(make_plan(TASKS["mmvp"], 0, **MMVP)).startswith("mmvp: no items were answered")


def test_an_answer_lost_in_transport_is_no_score(score):
    plan = make_plan(TASKS["mmvp"], 300, **MMVP)
    plan["samples"]["mmvp"][4]["filtered_resps"] = "[LMMS_EVAL_REQUEST_FAILED after 5 retries]"
    assert score(plan).startswith("mmvp item 295: its answer was lost in transport")


@pytest.mark.parametrize(
    "line",
    [
        "All 5 attempts failed",
        "v1_0 failed to get a score.",
        "Server evaluation failed: 401",
        "GPT API failed to answer. ",
    ],
)
def test_a_verdict_that_did_not_arrive_is_no_score(score, line):
    plan = make_plan(TASKS["mmvp"], 300, **MMVP)
    plan["log"] = f"\x1b[31m2026 | ERROR | {line}\x1b[0m"
    assert score(plan).startswith("a verdict of the judge did not arrive")


@pytest.mark.parametrize("value", [None, float("nan")])
def test_a_metric_that_is_missing_or_no_number_is_no_score(score, value):
    plan = make_plan(TASKS["mmvp"], 300, mmvp_accuracy=0.5)
    if value is not None:
        plan["results"]["results"]["mmvp"]["mmvp_pair_accuracy,none"] = value
    assert score(plan).startswith("mmvp: lmms-eval reports no mmvp_pair_accuracy, only mmvp_accuracy")


def test_a_harness_that_ends_well_without_results_is_no_score(score, tmp_path):
    plan = make_plan(TASKS["mmvp"], 300, **MMVP) | {"results": None}
    plan["log"] = "Traceback:\nValueError: the reason\ntenacity.RetryError: RetryError[<Future>]\nRetrying ..."
    error = score(plan)
    assert error.startswith("lmms-eval gave no results: ValueError: the reason. The whole log: ")
    assert (tmp_path / "results_answers/harness.log").read_text().startswith("Traceback")


def test_a_harness_that_ends_badly_is_no_score_whatever_it_wrote(score):
    plan = make_plan(TASKS["mmvp"], 300, **MMVP) | {"code": 3, "log": "Killed"}
    assert score(plan).startswith("lmms-eval gave no results: Killed.")


def test_an_error_is_one_short_line(tmp_path):
    log = tmp_path / "log"
    log.write_text("\x1b[31mKeyError: 'answer'\x1b[0m\nmore\n" + "x" * 900)
    assert last_error(log) == "KeyError: 'answer'."
    log.write_text("x" * 900)
    assert len(last_error(log)) == 301
    log.write_text("")
    assert last_error(log) == "it said nothing."


# ---- before anything runs


def test_answers_of_another_checkpoint_are_not_gone_on_with(score, checkpoint, tmp_path):
    plan = make_plan(TASKS["mmvp"], 300, **MMVP)
    score(plan)
    other = save_checkpoint(tmp_path / "other", seed=1)
    shutil.copytree(other, tmp_path / "moved")
    error = score(plan, "--model", str(other))
    assert "run.json was begun with model" in error and len(read_calls(tmp_path)) == 3
    assert "batch_size 1, not 4" in score(plan, "--batch_size", "4")


def test_tasks_that_are_not_in_the_suite_are_refused_and_all_leaves_judges_out(score):
    error = score(make_plan(TASKS["mmvp"], 1), tasks="mmvp,seedbench_ppl")
    assert error.startswith("--tasks 'seedbench_ppl': not in the suite") and "vqav2_val" in error
    assert score(make_plan(TASKS["mmvp"], 1), tasks=",").startswith("--tasks ','")
    chosen = understanding.choose_tasks("all")
    assert len(chosen) == 19 and not any(task.needs_judge for task in chosen)
    assert [task.name for task in understanding.choose_tasks("pope,mme,pope")] == ["pope", "mme"]


def test_a_judged_task_without_a_key_is_refused_before_any_work(score, monkeypatch, tmp_path):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    error = score(make_plan(TASKS["mmvet"], 218, gpt_eval_score=50.0), tasks="mmvp,mmvet")
    assert error.startswith("mmvet: a language model judges the answers, and OPENAI_API_KEY is not set")
    assert not (tmp_path / "plan.json.calls").exists()
    monkeypatch.setenv("API_TYPE", "azure")
    assert "AZURE_API_KEY is not set" in score(make_plan(TASKS["mmvet"], 218), tasks="mmvet")
    monkeypatch.setenv("AZURE_API_KEY", "a key")
    monkeypatch.setenv("MODEL_VERSION", "my-judge")
    results = score(make_plan(TASKS["mmvet"], 218, gpt_eval_score=50.0), tasks="mmvet")
    assert results["settings"]["judge"] == "my-judge"


def test_a_missing_harness_and_a_missing_plug_in_name_the_way_to_get_them(score, tmp_path):
    plan = make_plan(TASKS["mmvp"], 300, **MMVP)
    plan["probe"] = {"versions": PROBED["versions"] | {"lmms-eval": None}, "models": []}
    assert "has no lmms-eval. Set it up with `make lmms-eval`" in score(plan)
    plan["probe"] = PROBED | {"models": ["another"]}
    assert "not our plug-in for it, evaluation/lmms_eval_plugin" in score(plan)
    assert "no Python that starts" in score(plan, "--harness_python", str(tmp_path / "nowhere"))
    assert "not a Python" in score(plan, "--harness_python", shutil.which("false"))


def test_a_relative_path_to_the_harness_is_of_the_folder_one_is_in(score, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = score(make_plan(TASKS["mmvp"], 300, **MMVP), "--harness_python", "python")
    assert results["tasks"]["mmvp"]["n"] == 300


def test_the_probe_tells_the_truth_about_this_python():
    import sys

    import torch

    try:
        assert probe(Path(sys.executable))["torch"] == torch.__version__
    except ValueError as error:
        assert re.search("has no lmms-eval|not our plug-in", str(error))


def test_a_checkpoint_that_is_none_is_refused(score, tmp_path):
    assert "nowhere: no such folder" in score(make_plan(TASKS["mmvp"], 1), "--model", "nowhere")
    assert "config.json" in score(make_plan(TASKS["mmvp"], 1), "--model", str(tmp_path))


@pytest.mark.parametrize("flag", ["--limit", "--batch_size", "--num_processes"])
def test_numbers_below_one_are_refused(score, flag):
    assert f"argument {flag}: '0': expected a whole number of at least 1" in score(
        make_plan(TASKS["mmvp"], 1), flag, "0"
    )


def test_a_path_that_the_harness_cannot_take_is_refused(score, checkpoint, tmp_path):
    copied = shutil.copytree(checkpoint, tmp_path / "a,b")
    assert "lmms-eval cannot take a path with ," in score(make_plan(TASKS["mmvp"], 1), "--model", str(copied))


# ---- local data sets


def test_a_data_set_that_is_absent_or_empty_is_named(score, tmp_path):
    plan = make_plan(TASKS["mmvp"], 300, **MMVP)
    error = score(plan, "--data", str(tmp_path / "data"))
    assert f"{tmp_path / 'data/lmms-lab-eval/MMVP'}: no such data set" in error and "hf download" in error
    (tmp_path / "data/lmms-lab-eval/MMVP").mkdir(parents=True)
    assert "no data in it" in score(plan, "--data", str(tmp_path / "data"))


def test_a_data_set_with_a_missing_or_a_broken_part_is_refused(score, tmp_path):
    plan = make_plan(TASKS["mmvp"], 300, **MMVP)
    folder = tmp_path / "data/lmms-lab-eval/MMVP/data"
    write_parquet(folder / "train-00000-of-00002-ab12.parquet", [{"Question": "a"}])
    assert "part 2 of 2 of train-* is missing" in score(plan, "--data", str(tmp_path / "data"))
    pointer = folder / "train-00001-of-00002-cd34.parquet"
    for content in (b"version https://git-lfs.github.com/spec/v1\n", b"PAR1 cut off", b""):
        pointer.write_bytes(content)
        assert "cut off, or a pointer of git LFS" in score(plan, "--data", str(tmp_path / "data"))
    write_parquet(pointer, [{"Question": "b"}])
    assert score(plan, "--data", str(tmp_path / "data"))["tasks"]["mmvp"]["value"] == 0.25


# ---- processes


def test_the_progress_bar_of_the_plug_in_is_the_one_that_is_shown(score, capsys):
    assert answers.PROGRESS == understanding_harness.PROGRESS
    plan = make_plan(TASKS["mmvp"], 300, **MMVP)
    score(plan | {"log": f"INFO hidden\r{answers.PROGRESS}: 50%\r{answers.PROGRESS}: 100%\nINFO also hidden"})
    assert capsys.readouterr().err == f"\r{answers.PROGRESS}: 50%\r{answers.PROGRESS}: 100%\n"


def test_several_processes_ask_and_one_more_scores(score, tmp_path):
    one = score(make_plan(TASKS["mmvp"], 300, **MMVP))
    (tmp_path / "plan.json.calls").unlink()
    two = score(make_plan(TASKS["mmvp"], 300, **MMVP), "--num_processes", "2")
    one["run"].pop("seconds"), two["run"].pop("seconds")
    assert one == two
    shards = [re.search(r"shard=(\d/\d)", " ".join(call)) for call in read_calls(tmp_path)]
    assert sorted(shard.group(1) for shard in shards if shard) == ["1/1", "1/2", "2/2"]
    assert shards[-1].group(1) == "1/1"


def test_each_process_gets_its_own_gpu_and_local_data_need_no_network(monkeypatch, tmp_path):
    run = understanding.Run(Path("python"), tmp_path, tmp_path, tmp_path, "auto", "auto", 1, None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = [build_environment(run, index, 3)["CUDA_VISIBLE_DEVICES"] for index in range(3)]
    assert found == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert [build_environment(run, index, 2)["CUDA_VISIBLE_DEVICES"] for index in range(2)] == ["4", "7"]
    assert build_environment(run, 0, 1)["CUDA_VISIBLE_DEVICES"] == "4,7"
    environment = build_environment(run, 0, 1)
    assert environment["HF_DATASETS_OFFLINE"] == "1" and environment["PYTHONPATH"].startswith(str(ROOT))
    monkeypatch.delenv("HF_DATASETS_OFFLINE", raising=False)
    assert "HF_DATASETS_OFFLINE" not in build_environment(run._replace(data=None), 0, 1)


# ---- the page


def test_the_page_shows_the_suite_as_the_code_has_it():
    for task in SUITE:
        judge = "yes" if task.needs_judge else "no"
        cells = (task.benchmark, f"`{task.name}`", task.split, f"{task.num_items:,}", f"`{task.metric}`", judge)
        assert f"| {' | '.join(cells)} | {task.license} |" in PAGE, task.name
    rows = re.findall(r"^\| [^|]+ \| `\w+` \| .* \| (?:yes|no) \| [^|]+ \|$", PAGE, flags=re.MULTILINE)
    assert len(rows) == len(SUITE)

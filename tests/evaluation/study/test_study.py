"""Claims about `evaluation.study`: the plan of commands, going on where it was stopped, and the numbers of its page."""

import json
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from evaluation.study import __main__ as commands
from evaluation.study import plots, report, steps
from evaluation.study.arms import ARMS, BUDGETS, QUESTIONS, STARTS
from evaluation.study.steps import Plan, Step, run_step


ROOT = Path(__file__).parents[3]
TOY = BUDGETS["toy"]


def make_plan(work: Path, seeds=(0, 1, 2), model: str = "pisces-tiny") -> Plan:
    return Plan(work, model, TOY, list(seeds), bf16=False)


def flag(step: Step, name: str) -> str:
    return step.command[step.command.index(f"--{name}") + 1]


# ---- plan


def test_every_question_is_asked_of_known_arms_and_every_arm_answers_one():
    asked = [arm for question in QUESTIONS.values() for arm in question.arms]
    assert set(asked) | {"base"} == set(ARMS) and len(asked) == len(set(asked))
    assert {arm.start for arm in ARMS.values()} == set(STARTS)


def test_each_arm_differs_from_the_base_in_one_thing():
    base = ARMS["base"]
    for name, arm in ARMS.items():
        changed = [
            field
            for field in ("start", "sides", "stages", "input_noise")
            if getattr(arm, field) != getattr(base, field)
        ]
        assert len(changed) == (name != "base"), name


def test_all_arms_take_equally_many_steps_of_equally_many_rows(tmp_path):
    """Joint training sees, of each side, as many rows as training that side alone; captions stages only move steps."""
    plan = make_plan(tmp_path)
    for name in ARMS:
        trained = plan.train(name, 0)
        assert sum(int(flag(step, "max_steps")) for step in trained) == sum(TOY.stage_steps.values()), name
        assert {flag(step, "batch_size") for step in trained} == {str(TOY.batch_size)}
    assert [flag(step, "pattern") for step in plan.train("understanding_alone", 0)] == ["u"] * 3
    assert [flag(step, "stage") for step in plan.train("no_detail", 0)] == ["pretrain", "instruct"]


def test_whatever_a_step_reads_was_made_by_an_earlier_wave_or_link(tmp_path):
    plan = make_plan(tmp_path)
    made: set[str] = set()
    for wave in plan.waves():
        before = set(made)
        for chain in wave:
            here = set(before)
            for step in chain:
                paths = {word for word in step.command if word.startswith(str(tmp_path))}
                read = {path for path in paths if not path.startswith(str(step.folder))}
                assert read <= here | {
                    str(tmp_path / "towers/vision_tower"),
                    str(tmp_path / "towers/gen_vision_tower"),
                }
                here.add(str(step.folder))
            made |= here
    folders = [step.folder for wave in plan.waves() for chain in wave for step in chain]
    assert len(folders) == len(set(folders))
    assert sum("scores" in str(folder) for folder in folders) == len(ARMS) * 3


def test_arms_that_draw_the_same_vectors_share_a_reader(tmp_path):
    plan = make_plan(tmp_path)
    readers = {name: plan.reader(arm.start).folder.name for name, arm in ARMS.items()}
    assert readers["cosine"] == readers["shared_gen_clip"] == readers["base"] == "gen_vision_tower_2"
    assert len(set(readers.values())) == 4


# ---- steps


def script_runs(monkeypatch, run):
    """Let `run` stand in for `subprocess.run`, for the study alone: results files ask git through the real one."""
    monkeypatch.setattr(steps, "subprocess", SimpleNamespace(run=run))


def test_a_finished_step_is_not_run_again_and_another_command_is_refused(tmp_path, monkeypatch):
    ran = []
    done = subprocess.CompletedProcess([], 0)
    script_runs(monkeypatch, lambda command, **_: ran.append(command) or done)
    step = Step(tmp_path / "work/one", ("some.module", "--flag", "1"))
    run_step(step)
    run_step(step)
    assert [command[1:] for command in ran] == [["-m", "some.module", "--flag", "1"]]
    assert step.record["command"] == ["some.module", "--flag", "1"]
    with pytest.raises(ValueError, match=r"was made by `python -m some.module --flag 1`, not by .* another --work"):
        run_step(replace(step, command=("some.module", "--flag", "2")))


def test_a_failing_command_is_named_with_its_last_line_and_leaves_no_record(tmp_path):
    step = Step(tmp_path / "one", ("finetune.scenes", "--output", str(tmp_path / "one"), "--num_scenes", "0"))
    with pytest.raises(
        ChildProcessError, match=r"python -m finetune.scenes failed, see .*one.log: .*--num_scenes: '0': expected"
    ):
        run_step(step)
    assert step.record is None


def test_a_failure_ends_the_plan_and_the_command_in_one_line(tmp_path, monkeypatch):
    def fail(step):
        raise ChildProcessError(f"{step.folder.name} failed")

    monkeypatch.setattr(steps, "run_step", fail)
    with pytest.raises(SystemExit, match=r"error: .* failed"):
        commands.main(["run", "--work", str(tmp_path), "--budget", "toy"])


@pytest.fixture
def in_this_process(monkeypatch):
    """Commands run here instead of in processes of their own, because importing torch takes longer than a toy step."""

    def run(command, **_):
        monkeypatch.setattr(sys, "argv", command[2:])
        if command[2] == "evaluation.study":
            commands.main(command[3:])
        else:
            runpy.run_module(command[2], run_name="__main__")
        return subprocess.CompletedProcess(command, 0)

    script_runs(monkeypatch, run)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.timeout(300)
def test_the_whole_study_runs_at_toy_size_and_fills_the_page(tmp_path, monkeypatch, in_this_process, capsys):
    """Three arms of different starts and sides; the others differ from them in flags that the plan's tests read."""
    few = {name: ARMS[name] for name in ("base", "shared_gen_clip", "understanding_alone")}
    for module in (steps, report):
        monkeypatch.setattr(module, "ARMS", few)
    monkeypatch.setattr(steps, "STARTS", {name: STARTS[name] for name in ("base", "shared_gen_clip")})
    one = {"encoders": replace(QUESTIONS["encoders"], arms=("shared_gen_clip",))}
    for module in (report, plots):
        monkeypatch.setattr(module, "QUESTIONS", one)
    flags = ["--work", str(tmp_path / "work"), "--model", str(ROOT / "pisces-tiny"), "--budget", "toy", "--jobs", "1"]
    commands.main(["run", *flags, "--seeds", "0", "1"])

    page = tmp_path / "study.md"
    page.write_text("\n".join(line for name in ("run", "encoders") for line in report.markers(name)))
    where = ["--results", str(tmp_path / "study.json"), "--page", str(page)]
    commands.main(["report", "--work", str(tmp_path / "work"), "--seeds", "0", "1", *where])
    commands.main(["report", "--check", *where])
    results = json.loads((tmp_path / "study.json").read_text())
    assert set(results["arms"]) == set(few) and len(results["arms"]["base"]["objects"]["values"]) == 2
    assert "objects" not in results["arms"]["understanding_alone"]
    assert len(results["run"]["commands"]) == 4 + 1 + 2 * 2 + 3 * 2 * (3 + 1) + 1 + 2
    assert "| gen-CLIP for both |" in page.read_text() and (tmp_path / "study_encoders.png").is_file()


def test_a_work_folder_of_another_budget_is_refused_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(commands, "run_plan", lambda *_: None)
    commands.main(["run", "--work", str(tmp_path), "--budget", "toy"])
    commands.main(["run", "--work", str(tmp_path), "--budget", "toy", "--seeds", "0", "1", "2", "3"])
    with pytest.raises(SystemExit, match=r"was begun with budget 'toy', not 'reduced'"):
        commands.main(["run", "--work", str(tmp_path)])


def test_the_commands_of_the_page_are_commands():
    text = (ROOT / "docs/study.md").read_text(encoding="utf-8")
    found = [line.split() for line in text.splitlines() if line.startswith("python -m evaluation.study ")]
    assert len(found) == 2
    for words in found:
        commands.make_parser().parse_args(words[3:])
    assert all(marker in text for name in ("run", *QUESTIONS) for marker in report.markers(name))


# ---- report


def test_differences_are_taken_seed_by_seed_with_students_interval():
    # differences 0.1, 0.2, 0.3: mean 0.2, deviation 0.1, half width 4.303 * 0.1 / sqrt(3)
    found = report.compare_seeds([0.5, 0.7, 0.9], [0.4, 0.5, 0.6])
    assert found == {"mean": 0.2, "low": pytest.approx(-0.0484, abs=1e-4), "high": pytest.approx(0.4484, abs=1e-4)}
    assert report.summarize_seeds([0.1, 0.2, 0.3]) == {"mean": 0.2, "sd": 0.1, "values": [0.1, 0.2, 0.3]}


def fake_results() -> dict:
    """A results file as `collect` makes it, with numbers that can be told apart."""
    arms = {}
    for index, (name, arm) in enumerate(ARMS.items()):
        metrics = {"questions": "u", "objects": "g", "detailed": "g", "whole": "g", "vector_r2": "g"}
        values = [round(0.3 + 0.01 * index + 0.001 * seed, 4) for seed in range(3)]
        arms[name] = {m: report.summarize_seeds(values) for m, side in metrics.items() if side in arm.sides}
        arms[name]["difference"] = {
            m: report.compare_seeds(values, arms["base"][m]["values"]) for m in arms[name] if name != "base"
        }
        arms[name]["ceiling"] = {"objects": 0.987, "whole": 0.954}
    share = {"value": 0.9, "n": 200, "low": 0.85, "high": 0.94}
    return {
        "budget": "toy",
        "seeds": [0, 1, 2],
        "model": "pisces-tiny",
        "sizes": TOY.__dict__,
        "arms": arms,
        "reader_check": {"agreement": share, "strict_reader": share, "strict_decoder": share},
        "seconds_of_all_commands": 3600,
        "run": {"begun_on": "one core", "versions": {"torch": "2", "transformers": "5"}},
    }


def test_a_clear_difference_is_bold_and_an_absent_side_has_no_row():
    results = fake_results()
    section = report.question_section(results, "joint")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("|")]
    assert rows[2] == ["questions answered", "both sides together", "0.301 ± 0.001", ""]
    assert rows[3] == ["", "understanding alone", "0.331 ± 0.001", "**+0.030** (+0.030 to +0.030)"]
    assert rows[4][:2] == [
        "objects drawn, short captions",
        "both sides together",
    ]  # a model that only draws has no row
    assert rows[5] == ["", "generation alone", "0.341 ± 0.001", "**+0.040** (+0.040 to +0.040)"]
    assert rows[-2:] == [
        ["reader's ceiling: objects, whole", "both sides together", "0.987, 0.954", ""],
        ["", "generation alone", "0.987, 0.954", ""],
    ]
    results["arms"]["cosine"]["difference"]["objects"] = {"mean": 0.05, "low": -0.01, "high": 0.11}
    assert "| +0.050 (-0.010 to +0.110) |" in report.question_section(results, "loss")


def test_a_page_that_says_something_else_is_named(tmp_path):
    results, page, file = fake_results(), tmp_path / "study.md", tmp_path / "study.json"
    page.write_text("\n\n".join("\n".join(report.markers(name)) for name in ("run", *QUESTIONS)))
    page.write_text(report.fill_page(page.read_text(), results))
    file.write_text(json.dumps(results))
    for name, path in report.plot_paths(page).items():
        report.plot_question(results, name, report.METRICS, path)
    report.check_page(file, page)
    results["arms"]["cosine"]["objects"]["mean"] = 0.5
    file.write_text(json.dumps(results))
    with pytest.raises(ValueError, match=r"study.md, .*study_loss.png: not what .*study.json says"):
        report.check_page(file, page)


def test_what_cannot_work_is_refused_before_any_scene_is_drawn(tmp_path):
    work = tmp_path / "work"
    for flags, message in (
        (["--jobs", "0"], r"--jobs: '0': expected a whole number of at least 1"),
        (["--model", "nope"], r"error: nope: no such folder\. Give a checkpoint folder"),
        (["--model", str(tmp_path)], r"config\.json"),
    ):
        with pytest.raises(SystemExit, match=message):
            commands.main(
                ["run", "--work", str(work), "--budget", "toy", "--model", str(ROOT / "pisces-tiny"), *flags]
            )
    assert not work.exists()


def test_other_settings_and_missing_seeds_are_answered_with_the_flags_of_this_command(tmp_path):
    (tmp_path / "settings.json").write_text(json.dumps({"settings": {"budget": "full"}, "commits": []}))
    with pytest.raises(SystemExit, match=r"begun with budget 'full', not 'toy'\. Choose another --work, or"):
        commands.main(["run", "--work", str(tmp_path), "--budget", "toy", "--model", str(ROOT / "pisces-tiny")])
    with pytest.raises(SystemExit, match=r"is missing\. Run `.* --seeds 0 7` to its end"):
        commands.main(["report", "--work", str(tmp_path), "--seeds", "0", "7"])


def test_a_page_without_markers_and_a_study_without_end_are_refused(tmp_path):
    with pytest.raises(ValueError, match="the page lacks its markers '<!-- run: begin"):
        report.fill_page("# study", fake_results())
    with pytest.raises(ValueError, match=r"settings.json is missing. Run `python -m evaluation.study run"):
        report.collect(tmp_path, [0])
    (tmp_path / "settings.json").write_text(json.dumps({"settings": {"budget": "toy"}, "commits": []}))
    with pytest.raises(ValueError, match=r"scores/base/0/score.json is missing. Run .* to its end"):
        report.collect(tmp_path, [0])


def test_the_published_page_says_what_its_results_file_says():
    results, page = ROOT / "results/study.json", ROOT / "docs/study.md"
    if not results.is_file():
        pytest.skip("results/study.json is not here")
    report.check_page(results, page)
    done = json.loads(results.read_text(encoding="utf-8"))
    assert set(done["arms"]) == set(ARMS) and len(done["seeds"]) >= 3

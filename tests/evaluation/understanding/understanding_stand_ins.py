"""Stand-ins for the understanding tests: small local data sets with scripted answers, and a harness that only pretends."""

import json
import os
import shutil
import stat
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from evaluation.understanding.tasks import SUITE, Task
from tests.fixtures import make_model, make_processor


TASKS = {task.name: task for task in SUITE}


def save_checkpoint(folder: Path, seed: int = 0) -> Path:
    """A tiny random checkpoint without a decoder."""
    make_model(seed).save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return folder


# ---- data sets in the format of the published ones, eight items each


def picture(number: int) -> Image.Image:
    return Image.new("RGB", (20 + number, 30), (number * 25 % 256, 10, 200))


def write_data(folder: Path) -> dict[str, str]:
    """POPE, MME and MMMU under `folder`, and a script of answers: {mark in a question: answer}."""
    script: dict[str, str] = {}
    write_parquet(folder / TASKS["pope"].dataset / "data/test-00000-of-00001.parquet", pope_rows(script))
    write_parquet(folder / TASKS["mme"].dataset / "data/test-00000-of-00001.parquet", mme_rows(script))
    write_parquet(folder / TASKS["mmmu_val"].dataset / "data/validation-00000-of-00001.parquet", mmmu_rows(script))
    return script


def pope_rows(script: dict[str, str]) -> list[dict[str, Any]]:
    """3 of 4 present things seen, and 2 of 4 absent ones: accuracy 5/8, precision 3/5, recall 3/4, F1 2/3."""
    truths = ["yes"] * 4 + ["no"] * 4
    answers = ["yes", "Yes", "yes", "no", "yes", "yes", "no", "No"]
    rows = []
    for number, (truth, answer) in enumerate(zip(truths, answers, strict=True)):
        script[f"[pope{number}]"] = answer
        question = f"[pope{number}] Is there a bench in the image?" + " Look." * number
        rows.append({"id": str(number), "question_id": str(number), "question": question, "answer": truth})
        rows[-1] |= {"image_source": "none", "image": picture(number), "category": "random"}
    return rows


def mme_rows(script: dict[str, str]) -> list[dict[str, Any]]:
    """Existence: one pair right (200), one half right (50); count: a pair wrong (0); code: a pair right (200)."""
    pairs = [("existence", 2), ("existence", 1), ("count", 0), ("code_reasoning", 2)]
    rows = []
    for pair, (category, num_right) in enumerate(pairs):
        for index, truth in enumerate(("Yes", "No")):
            mark = f"[mme{pair}{index}]"
            script[mark] = truth if index < num_right else {"Yes": "No", "No": "Yes"}[truth]
            rows.append({"question_id": f"{category}/{pair}.jpg", "image": picture(pair), "answer": truth})
            rows[-1] |= {"question": f"{mark} Is it so? Please answer yes or no.", "category": category}
    return rows


def mmmu_rows(script: dict[str, str]) -> list[dict[str, Any]]:
    """Five of eight right: letters and one number, in two subjects; every other question has two pictures."""
    letters = ["B", "(B)", "B", "A", "C", "B."]
    rows = []
    for number, answer in enumerate([*letters, "The answer is 42", "17"]):
        is_open, mark = number >= 6, f"[mmmu{number}]"
        script[mark] = answer
        row = {
            "id": f"validation_{'Art' if number % 2 else 'Accounting'}_{number}",
            "answer": "42" if is_open else "B",
        }
        row |= {"question": f"{mark} What is on <image 1>" + (" and <image 2>?" if number % 2 else "?")}
        row |= {"options": "[]" if is_open else "['a dog', 'a cat', 'a cow']"}
        row |= {"question_type": "open" if is_open else "multiple-choice"}
        row |= {f"image_{i}": picture(number + i) if i == 1 or (i == 2 and number % 2) else None for i in range(1, 8)}
        rows.append(row)
    return rows


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    path.parent.mkdir(parents=True, exist_ok=True)
    features = {name: ImageFeature() if name.startswith("image") else Value("string") for name in rows[0]}
    features["image_source"] = Value("string")
    features = Features({name: features[name] for name in rows[0]})
    Dataset.from_list(rows, features=features).to_parquet(str(path))


# ---- the scripted checkpoint

ENTRY = """
def describe_models():
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="scripted", chat_class_path="scripted_model.ScriptedPisces")
"""


def install_scripted_model(folder: Path, script: dict[str, str]) -> dict[str, str]:
    """An entry point in `folder`, and the environment in which lmms-eval finds the model `scripted`."""
    info = folder / "scripted-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: scripted\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[lmms_eval.models]\nscripted = scripted_entry:describe_models\n")
    (folder / "scripted_entry.py").write_text(ENTRY)
    # as a module of its own: another package named tests may lie in the harness's environment
    shutil.copy(Path(__file__).with_name("understanding_scripted_model.py"), folder / "scripted_model.py")
    (folder / "script.json").write_text(json.dumps(script))
    return {"PYTHONPATH": str(folder), "SCRIPT_OF_ANSWERS": str(folder / "script.json")}


# ---- a harness that is an executable file: it answers the probe, and writes the files that a test wants

FAKE = """#!{python}
import json, pathlib, sys
plan = json.loads(pathlib.Path({plan!r}).read_text())
with open({plan!r} + ".calls", "a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
if sys.argv[1] == "-c":
    print(json.dumps(plan["probe"]))
    sys.exit()
print(plan["log"])
if plan["results"] is not None and "shard=1/1" in " ".join(sys.argv):  # a part of the answers has no score
    folder = pathlib.Path(sys.argv[sys.argv.index("--output_path") + 1]) / "some__model"
    folder.mkdir(parents=True)
    (folder / "now_results.json").write_text(json.dumps(plan["results"]))
    for name, rows in plan["samples"].items():
        (folder / f"now_samples_{{name}}.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
sys.exit(plan["code"])
"""
PROBED = {
    "versions": {"lmms-eval": "0.7.3", "transformers": "5.23.0", "torch": "2.13.0", "datasets": "5.2.0"},
    "models": ["pisces"],
}


def make_plan(task: Task, num_items: int, **metrics: float) -> dict[str, Any]:
    """What a harness writes that has answered `num_items` of one task."""
    rows = [
        {"doc_id": index, "target": "yes", "filtered_resps": "yes", "input": f"question {index}"}
        for index in reversed(range(num_items))
    ]
    found = {"alias": task.name, **{f"{name},none": value for name, value in metrics.items()}}
    results = {"results": {task.name: found}, "group_subtasks": {task.name: []}}
    results |= {"n-samples": {task.name: {"original": num_items, "effective": num_items}}}
    return {"probe": PROBED, "log": "fine", "code": 0, "results": results, "samples": {task.name: rows}}


def make_whole_plan(**scores: float) -> dict[str, Any]:
    """What a harness writes that has answered all items of some tasks, each with its metric to quote."""
    plans = [
        make_plan(TASKS[name], TASKS[name].num_items, **{TASKS[name].metric: value}) for name, value in scores.items()
    ]
    whole = plans[0]
    for plan in plans[1:]:
        whole["samples"] |= plan["samples"]
        for part in ("results", "group_subtasks", "n-samples"):
            whole["results"][part] |= plan["results"][part]
    return whole


def write_fake_harness(folder: Path, plan: dict[str, Any]) -> Path:
    """An executable that stands for the harness's Python; the commands it got are in `read_calls`."""
    (folder / "plan.json").write_text(json.dumps(plan))
    path = folder / "python"
    path.write_text(FAKE.format(python=sys.executable, plan=str(folder / "plan.json")))
    os.chmod(path, path.stat().st_mode | stat.S_IXUSR)
    return path


def read_calls(folder: Path) -> list[list[str]]:
    """The arguments of each start of the fake harness."""
    return [json.loads(line) for line in (folder / "plan.json.calls").read_text().splitlines()]

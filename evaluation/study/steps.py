"""From arms to commands: what the study runs, in which order, and how it goes on after it was stopped.

A step is one command with a folder of its own below the work folder; when it has ended well, `step.json` there says
what ran and how long. A step with such a record is not run again. Rooms do not import each other: training is
`python -m finetune...`, scoring `python -m evaluation.study score`.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from evaluation.study.arms import ARMS, STARTS, Arm, Budget
from pisces_commands.writing import write_json


ROOT = Path(__file__).parents[2]
RECORD = "step.json"


@dataclass(frozen=True)
class Step:
    """A module with its flags that fills `folder`."""

    folder: Path
    command: tuple[str, ...]

    @property
    def record(self) -> dict[str, Any] | None:
        """What a finished step left, None before."""
        path = self.folder / RECORD
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


class Plan:
    """All steps of a study.

    Args:
        work: folder of everything that the study makes.
        model: checkpoint folder or Hub id whose towers are used.
        budget: how much of everything.
        seeds: of the language model's start and of the order of its rows; the towers are the same for all.
        bf16: bf16 products while training.
    """

    def __init__(self, work: Path, model: str, budget: Budget, seeds: Sequence[int], bf16: bool):
        self.work, self.model, self.budget, self.seeds, self.bf16 = work, model, budget, seeds, bf16

    def data(self) -> list[Step]:
        """Scenes to train, to teach readers and to score; and the towers."""
        budget = self.budget
        splits = {
            "train": ("train", 0, budget.num_scenes),
            "all_combinations": ("heldout", 2, budget.num_scenes),
            "heldout": ("heldout", 1, budget.num_heldout),
        }
        steps = [self._scenes(name, *settings) for name, settings in splits.items()]
        towers = ("finetune.parts", "towers", "--checkpoint", self.model, "--output", str(self.work / "towers"))
        return [*steps, Step(self.work / "towers", towers)]

    def prepare(self) -> Step:
        """The training scenes in the form that every start and every stage reads; vectors are kept there too."""
        folder = self.work / "prepared"
        command = ("finetune.parts", "prepare", "--data", str(self.work / "train"), "--output", str(folder))
        return Step(folder, command)

    def _scenes(self, name: str, split: str, seed: int, num_scenes: int) -> Step:
        flags = f"--split {split} --seed {seed} --num_scenes {num_scenes} --max_objects {self.budget.max_objects}"
        command = ("finetune.scenes", "--output", str(self.work / name), *flags.split())
        return Step(self.work / name, command)

    def start(self, name: str, seed: int) -> Step:
        """A checkpoint with trained towers and a random language model."""
        folder, start = self.work / "start" / f"{name}-{seed}", STARTS[name]
        sizes = f"--hidden_size {self.budget.hidden_size} --num_hidden_layers {self.budget.num_hidden_layers}"
        command = [
            *("finetune.parts", "assemble", "--data", str(self.prepare().folder), "--output", str(folder)),
            *("--vision_tower", str(self.work / "towers" / start.vision_tower)),
            *("--gen_vision_tower", str(self.work / "towers" / start.gen_vision_tower)),
            *("--gen_head_type", "mlp", "--whiten", "--seed", str(seed), *sizes.split(), *start.flags),
        ]
        return Step(folder, tuple(command))

    def reader(self, name: str) -> Step:
        """What reads the vectors of a start; they are the same for every seed."""
        folder = self.work / "reader" / STARTS[name].vectors
        data = [str(self.work / part) for part in ("train", "all_combinations")]
        command = [
            *("evaluation.study", "reader", "--checkpoint", str(self.start(name, self.seeds[0]).folder)),
            *("--data", *data, "--heldout", str(self.work / "heldout")),
            *("--output", str(folder), "--max_steps", str(self.budget.reader_steps)),
        ]
        return Step(folder, tuple(command))

    def check(self) -> list[Step]:
        """A reader for the published model's own vectors, held against its decoder and the scorer of pictures."""
        reader = self.reader("base")
        own = Step(self.work / "reader" / "published", _replaced(reader.command, "--checkpoint", self.model))
        own = Step(own.folder, _replaced(own.command, "--output", str(own.folder)))
        folder = self.work / "check"
        flags = ("--model", self.model, "--reader", str(own.folder), "--data", str(self.work / "heldout"))
        return [own, Step(folder, ("evaluation.study", "check", *flags, "--output", str(folder / "check.json")))]

    def train(self, name: str, seed: int) -> list[Step]:
        """The stages of one arm, each from the one before."""
        arm, checkpoint, steps = ARMS[name], self.start(ARMS[name].start, seed).folder, []
        for number, (stage, shares) in enumerate(arm.stages.items(), 1):
            folder = self.work / "runs" / name / str(seed) / f"{number}_{stage}"
            num_steps = sum(self.budget.stage_steps[share] for share in shares)
            steps.append(Step(folder, self._train_command(arm, stage, num_steps, seed, checkpoint, folder)))
            checkpoint = folder
        return steps

    def _train_command(
        self, arm: Arm, stage: str, num_steps: int, seed: int, checkpoint: Path, folder: Path
    ) -> tuple[str, ...]:
        is_last = stage == "instruct"
        settings = {
            "stage": stage,
            "checkpoint": checkpoint,
            "data": self.prepare().folder,
            "output": folder,
            "pattern": arm.sides,
            "input_noise": arm.input_noise,
            "max_steps": num_steps,
            "batch_size": self.budget.batch_size,
            "learning_rate": self.budget.learning_rate,
            # finetune/tiny/tiny.sh: the rate is held through the first stages and annealed once, in the last
            "schedule": "cosine" if is_last else "constant_with_warmup",
            "warmup_steps": 50,
            "ema_decay": 0.98,
            "seed": seed,
            "bf16": self.bf16,
        }
        flags = [text for flag, value in settings.items() for text in (f"--{flag}", str(value))]
        return ("finetune.train_stages", *flags)

    def score(self, name: str, seed: int) -> Step:
        """Both sides of a trained arm; the side that it never trained stays out."""
        arm, folder = ARMS[name], self.work / "scores" / name / str(seed)
        command = [
            *("evaluation.study", "score", "--checkpoint", str(self.train(name, seed)[-1].folder)),
            *("--reader", str(self.reader(arm.start).folder), "--data", str(self.work / "heldout")),
            *("--sides", arm.sides, "--num_questions", str(self.budget.num_questions)),
            *("--output", str(folder / "score.json")),
        ]
        return Step(folder, tuple(command))

    def waves(self) -> list[list[list[Step]]]:
        """Chains of steps that need nothing of each other, wave after wave.

        The first arm of each kind of vectors goes before the others: its first stage writes the encoded pictures that
        they read.
        """
        starts = [[self.start(name, seed)] for name in STARTS for seed in self.seeds]
        leaders = {STARTS[arm.start].vectors: name for name, arm in reversed(ARMS.items())}
        runs = {
            (name, seed): [*self.train(name, seed), self.score(name, seed)] for name in ARMS for seed in self.seeds
        }
        first = [[self.reader(ARMS[name].start), *runs.pop((name, self.seeds[0]))] for name in leaders.values()]
        return [[[step] for step in self.data()], [[self.prepare()]], starts, first, [*runs.values(), self.check()]]


def _replaced(command: tuple[str, ...], flag: str, value: str) -> tuple[str, ...]:
    place = command.index(flag) + 1
    return (*command[:place], value, *command[place + 1 :])


def run_step(step: Step) -> None:
    """Run one command, unless its record says that it has run; what it prints goes to `log.txt` in its folder.

    Raises:
        ValueError: the folder was filled by another command.
        ChildProcessError: the command failed; the message ends with the last line that it printed.
    """
    if (record := step.record) is not None:
        if record["command"] != list(step.command):
            raise ValueError(
                f"{step.folder} was made by `python -m {' '.join(record['command'])}`, not by `python -m "
                f"{' '.join(step.command)}`. Choose another --work, or repeat the study with the old settings."
            )
        return
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    log = step.folder.with_name(step.folder.name + ".log")  # beside it: `finetune.scenes` wants an empty folder
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with log.open("a", encoding="utf-8") as file:
        done = subprocess.run([sys.executable, "-m", *step.command], env=environment, stdout=file, stderr=file)
    if done.returncode:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        reason = lines[-1].removeprefix("error: ") if lines else "no output"
        raise ChildProcessError(f"python -m {step.command[0]} failed, see {log}: {reason}")
    write_json(step.folder / RECORD, {"command": step.command, "seconds": round(time.monotonic() - start, 1)})


def run_plan(plan: Plan, jobs: int) -> None:
    """Run every step that has not run yet, `jobs` chains at a time; the first failure ends it after what is running.

    Raises:
        ValueError, ChildProcessError: see `run_step`.
    """
    waves = plan.waves()
    with tqdm(total=sum(len(chain) for wave in waves for chain in wave), desc="study", unit="step") as bar:

        def run_chain(chain: list[Step]) -> None:
            for step in chain:
                run_step(step)
                bar.update()

        for wave in waves:
            with ThreadPoolExecutor(jobs) as pool:
                futures = [pool.submit(run_chain, chain) for chain in wave]
                try:
                    for future in as_completed(futures):
                        future.result()
                except BaseException:
                    pool.shutdown(wait=True, cancel_futures=True)
                    raise

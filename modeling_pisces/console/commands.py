"""What the commands of `pisces` do: describe, draw, edit, reconstruct, info, push.

`pisces_commands/console.py` parses the arguments and turns exceptions into one line and an exit code. Here a command
checks the checkpoint and its inputs, loads the model, works through the inputs one by one, and reports one that cannot
be used without giving up the others. Names of pictures in and out are the business of
`modeling_pisces/console/pictures.py`.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from pisces_commands.writing import write_whole

from ..checkpoint.adapters import (
    Adapter,
    AttachedAdapters,
    attach_adapters,
    describe_adapter,
    find_model,
    format_adapter,
)
from ..checkpoint.files import check_checkpoint
from ..checkpoint.info import describe_checkpoint, format_checkpoint
from ..checkpoint.loading import load_model, load_pipeline, quiet_libraries
from .answers import DEFAULT_QUESTION, answer_questions
from .contact_sheet import Section, Tile, make_contact_sheet
from .known_words import KNOWN_WORDS, unknown_words
from .pictures import OutputPlace, UsageError, find_pictures, first_usable


DEFAULT_MODEL = "pisces-tiny"


def run_command(args: argparse.Namespace) -> int:
    """Run the command that `args` names and return its exit code."""
    if args.command == "push":
        with nullcontext() if args.verbose else quiet_libraries():
            return _push(args)
    if args.command in ("embed", "search") or getattr(args, "data", None):
        from .many_commands import run_many  # many pictures, or an index of them

        with nullcontext() if args.verbose else quiet_libraries():
            return run_many(args)
    command = {
        "describe": _describe,
        "draw": _draw,
        "edit": _edit,
        "reconstruct": _reconstruct,
        "info": _info,
    }[args.command]
    with nullcontext() if args.verbose else quiet_libraries():
        folder, args.adapters = _checked_checkpoint(args)
        return command(args, folder)


def _checked_checkpoint(args: argparse.Namespace) -> tuple[Path, tuple[Adapter, ...]]:
    name = getattr(args, "checkpoint", None) or args.model
    if name is None and not Path(DEFAULT_MODEL).is_dir():
        raise UsageError(f"no folder ./{DEFAULT_MODEL} here. Name a checkpoint: --model FOLDER or --model OWNER/NAME.")
    try:
        folder, adapters = find_model(name or DEFAULT_MODEL, args.adapter, args.revision)
        check_checkpoint(folder, with_decoder=args.command in ("draw", "edit", "reconstruct"))
    except ValueError as error:
        raise UsageError(str(error)) from error
    return folder, adapters


def _load(
    loader: Callable[..., Any], args: argparse.Namespace, folder: Path, uses_language_model: bool = True
) -> tuple[Any, AttachedAdapters]:
    """What the loader returns, and the adapters that are on it now."""
    try:
        loaded = loader(folder, args.device, args.dtype, args.trust_remote_code)
        if not args.adapters:
            return loaded, AttachedAdapters()
        pipeline = None if isinstance(loaded, tuple) else loaded
        model = loaded[0] if pipeline is None else pipeline.vision_language_model
        if not uses_language_model:
            for adapter in args.adapters:
                if "language model" in adapter.sides:
                    print(
                        f"warning: {adapter.name} is for the language model, which has no part here", file=sys.stderr
                    )
        return loaded, attach_adapters(args.adapters, model if uses_language_model else None, pipeline)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _info(args: argparse.Namespace, folder: Path) -> int:
    info, adapters = describe_checkpoint(folder), [describe_adapter(adapter) for adapter in args.adapters]
    if args.json:
        print(json.dumps({"command": "info", **info, "adapters": adapters}))
    else:
        print("\n\n".join([format_checkpoint(info), *map(format_adapter, adapters)]))
    return 0


def _push(args: argparse.Namespace) -> int:
    from ..hub.publish import publish  # nothing of it is needed to answer or to draw

    try:
        report = publish(
            args.folder,
            args.repo,
            private=not args.public,
            license=args.license,
            data=args.data,
            base=args.base,
            revision=args.revision,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    print(json.dumps({"command": "push", **asdict(report)}) if args.json else report)
    return 0


def _describe(args: argparse.Namespace, folder: Path) -> int:
    pictures = find_pictures(args.images)
    questions = args.questions or [DEFAULT_QUESTION]
    if not all(question.strip() for question in questions):
        raise UsageError("a --question is empty. Write one, or leave the option out to get a description.")
    load_picture = first_usable(pictures)
    (model, processor), _ = _load(load_model, args, folder)
    tiles: list[Tile] = []

    def answer_all(picture: str) -> list[dict[str, Any]]:
        image = load_picture(picture)
        answers = [answer_question(model, processor, image, question, args.max_new_tokens) for question in questions]
        tiles.append(Tile(image, "\n".join([Path(picture).name, *_question_lines(questions, answers)])))
        if not args.json:
            for question, answer in zip(questions, answers, strict=True):
                print(f"{picture}: {question} -> {' '.join(answer.split())}", flush=True)
        return [{"image": picture, "question": q, "answer": a} for q, a in zip(questions, answers, strict=True)]

    results, errors = _for_each(folder, "image", pictures, answer_all)
    return _finish(args, results, errors, [Section("Questions about pictures", tiles)])


def answer_question(
    model: Any, processor: Any, image: Image.Image, question: str, max_new_tokens: int | None = None
) -> str:
    """Ask one question about one picture; see `answer_questions`."""
    return answer_questions(model, processor, [(image, question)], max_new_tokens)[0]


def _question_lines(questions: list[str], answers: list[str]) -> list[str]:
    return [line for question, answer in zip(questions, answers, strict=True) for line in (question, f"> {answer}")]


def _draw(args: argparse.Namespace, folder: Path) -> int:
    if not any(prompt.strip() for prompt in args.prompts):
        raise UsageError("the prompt is empty. Say what to draw.")
    if args.compare and not args.adapters:
        raise UsageError("--compare shows what an adapter changes: name one with --adapter FOLDER_OR_ID.")
    if not args.adapters and (words := unknown_words(folder, args.prompts)):  # an adapter may have taught them
        print(f"warning: {folder} knows none of: {', '.join(words)} ({folder / KNOWN_WORDS})", file=sys.stderr)
    place = OutputPlace(args.output, len(args.prompts) * args.num_images * (2 if args.compare else 1))
    pipeline, attached = _load(load_pipeline, args, folder)
    tiles: dict[str, list[Tile]] = {}

    def draw_all(prompt: str) -> list[dict[str, Any]]:
        if not prompt.strip():
            raise ValueError("the prompt is empty. Say what to draw.")
        seeds = [args.seed + index for index in range(args.num_images)]
        with attached.off() if args.compare else nullcontext():
            results = draw_seeds(prompt, seeds, "without adapter" if args.compare else "")
        return results + (draw_seeds(prompt, seeds, "with adapter") if args.compare else [])

    def draw_seeds(prompt: str, seeds: list[int], how: str) -> list[dict[str, Any]]:
        images = pipeline(
            [prompt], num_images_per_prompt=len(seeds), generator=_generators(seeds), **_drawing_options(args)
        ).images
        results = []
        for image, seed in zip(images, seeds, strict=True):
            path = place.save(image, f"{prompt} {how}".strip(), seed)
            tiles.setdefault(how, []).append(Tile(image, f"{prompt}\nseed {seed}"))
            results.append({"prompt": prompt, "seed": seed, "path": path} | ({"adapter": how} if how else {}))
        return results

    results, errors = _for_each(folder, "prompt", args.prompts, draw_all, say=None if args.json else _say_path)
    if args.compare and not args.sheet:
        args.sheet = str(place.path / "compare.png")
    return _finish(args, results, errors, [Section(how.capitalize() or "Drawings", t) for how, t in tiles.items()])


def _edit(args: argparse.Namespace, folder: Path) -> int:
    instructions = [args.instruction, *(args.then or [])]
    for number, instruction in enumerate(instructions, start=1):
        if not instruction.strip():
            raise UsageError(f"the instruction of turn {number} is empty. Say what to change.")
    if args.strength is not None and not 0 < args.strength <= 1:
        raise UsageError(f"--strength is {args.strength:g}; expected a number above 0 and at most 1.")
    if args.strength is not None and not (folder / "vae").is_dir():
        raise UsageError(f"--strength starts from the picture's latents, and {folder} has no vae/. Leave it out.")
    picture = first_usable([args.image])(args.image)
    if not args.adapters and (words := unknown_words(folder, instructions)):  # an adapter may have taught them
        print(f"warning: {folder} knows none of: {', '.join(words)} ({folder / KNOWN_WORDS})", file=sys.stderr)
    place = OutputPlace(args.output, 1)
    pipeline, _ = _load(load_pipeline, args, folder)
    tiles = [Tile(picture, f"{Path(args.image).name}\nthe picture")]
    shown = [picture]  # after each turn

    def edit_once(instruction: str) -> list[dict[str, Any]]:
        turn = len(shown)
        options = {**_drawing_options(args), "strength": args.strength}
        edited = pipeline([instruction], image=[shown[-1]], generator=_generators([args.seed]), **options).images[0]
        shown.append(edited)
        tiles.append(Tile(edited, f"{instruction}\nturn {turn}, seed {args.seed}"))
        if place.is_file and turn < len(instructions):
            return []
        path = place.save(edited, f"{Path(args.image).stem} {turn} {instruction}", args.seed)
        return [{"image": args.image, "instruction": instruction, "turn": turn, "seed": args.seed, "path": path}]

    results, errors = _for_each(
        folder, "instruction", instructions, edit_once, say=None if args.json else _say_path, stop=True
    )
    return _finish(args, results, errors, [Section("A picture and its edits", tiles)])


def _reconstruct(args: argparse.Namespace, folder: Path) -> int:
    pictures = find_pictures(args.images)
    load_picture = first_usable(pictures)
    place = OutputPlace(args.output, len(pictures))
    pipeline, _ = _load(load_pipeline, args, folder, uses_language_model=False)
    tiles: list[Tile] = []

    def reconstruct_one(picture: str) -> list[dict[str, Any]]:
        image = load_picture(picture)
        again = pipeline.reconstruct([image], generator=_generators([args.seed]), **_drawing_options(args)).images[0]
        name = Path(picture).name
        tiles.extend([Tile(image, f"{name}\nthe picture"), Tile(again, f"{name}\nreconstruction")])
        return [{"image": picture, "seed": args.seed, "path": place.save(again, Path(picture).stem, args.seed)}]

    results, errors = _for_each(folder, "image", pictures, reconstruct_one, say=None if args.json else _say_path)
    return _finish(args, results, errors, [Section("Pictures and their reconstructions", tiles)])


def _generators(seeds: list[int]) -> list[Any]:
    import torch

    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]  # on the CPU: equal numbers on every device


def _drawing_options(args: argparse.Namespace) -> dict[str, Any]:
    given = {"num_inference_steps": args.steps, "guidance_scale": args.guidance_scale}
    return {name: value for name, value in given.items() if value is not None}


def _say_path(result: dict[str, Any]) -> None:
    print(result["path"], flush=True)


def _for_each(
    folder: Path,
    kind: str,
    items: Iterable[str],
    work: Callable[[str], list[dict[str, Any]]],
    say: Callable[[dict[str, Any]], None] | None = None,
    stop: bool = False,
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Do the work for each item; one that is refused is reported and the others go on, or with `stop` end.

    A checkpoint that fails before anything is done, with an error that no input causes, is named instead.
    """
    results: list[dict[str, Any]] = []
    errors: list[dict[str, str]] = []
    for item in items:
        try:
            done = work(item)
        except ValueError as error:
            message = " ".join(str(error).split())
            if not results and re.search(r"not finite|NaN", message) and str(folder) not in message:
                message = f"{folder}: {message} A setting in its JSON files may be wrong."  # no input does that
            errors.append({kind: item, "error": message})
            print(f"pisces: error: {message}", file=sys.stderr)
            if stop:
                break
            continue
        except (ArithmeticError, AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError) as error:
            if results or "out of memory" in str(error):
                raise
            raise UsageError(  # what loads and fails at first use: a setting of a wrong type, most of the time
                f"{folder}: fails at the first {kind} ({type(error).__name__}: {' '.join(str(error).split())[:500]})."
                " A setting in its JSON files may be wrong; --verbose shows where it fails."
            ) from error
        results.extend(done)
        if say:
            for result in done:
                say(result)
    return results, errors


def _finish(args: argparse.Namespace, results: list, errors: list, sections: list[Section]) -> int:
    """Write the sheet and the JSON object; return 0, 1 when some inputs failed, 2 when all did."""
    summary = {"command": args.command, "results": results, "errors": errors}
    if args.sheet and results:
        sheet = Path(args.sheet).expanduser()
        write_whole(sheet, make_contact_sheet(sections).save)
        summary["sheet"] = str(sheet)
        if not args.json:
            print(f"contact sheet: {sheet}", file=sys.stderr)
    if args.json:
        print(json.dumps(summary))
    if not errors:
        return 0
    return 1 if results else 2

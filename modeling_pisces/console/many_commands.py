"""`pisces describe, draw, edit --data`, `pisces embed`, `pisces search`: from flags to a job, and what is said of it.

`console/commands.py` hands over what has `--data` or an index. A job is run by `many.py`.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pisces_commands.arguments import UsageError
from pisces_commands.chat_server import ChatServer
from pisces_commands.ending import CommandFailed
from pisces_commands.measurement import hash_files
from pisces_commands.shards import workers_of

from ..checkpoint.adapters import Adapter
from ..checkpoint.loading import choose_device
from ..configuration_pisces import PiscesConfig
from ..image_loading_pisces import load_image
from .commands import DEFAULT_MODEL, _checked_checkpoint
from .embedding import KINDS, Vectors, check_kind, embed_images, embed_texts
from .many import Job, Shards, run_job, tally
from .search_index import MANY_ROWS, Hit, SearchIndex, has_usearch, write_index
from .shard_work import open_model


DECIDING = (".json", ".safetensors", ".jinja", ".model")  # endings of files that decide what a model says


def run_many(args: argparse.Namespace) -> int:
    """Run a command over data, or search; returns its exit code."""
    if args.command == "search":
        return _search(args)
    job = make_job(args)
    workers = workers_of(args, uses_gpus=args.device in ("auto", "cuda") and not job.opening.get("servers"))
    shards = run_job(job, args.data, args.output, args.rows_per_shard, workers)
    head = _finish_index(args, shards) if args.command == "embed" and not shards.missing() else None
    return _tell(args, shards, workers.share(range(shards.count)), head)


# ---- the job


def make_job(args: argparse.Namespace) -> Job:
    """What the flags ask for.

    Raises:
        UsageError: a model that cannot be used, or flags that contradict each other.
    """
    options = {"describe": _describe_options, "draw": _draw_options, "edit": _edit_options, "embed": _embed_options}
    chosen = options[args.command](args) | {"batch_size": args.batch_size}
    if getattr(args, "server", None):
        if args.model or args.adapter:
            raise UsageError("--server answers with a model of its own. Leave --model and --adapter out.")
        for url in args.server:
            ChatServer(url, args.server_model)  # a wrong address is refused here
        model = {"name": args.server_model, "digest": f"server {args.server_model}"}
        return Job(args.command, model, chosen, {"servers": args.server, "server_model": args.server_model})
    folder, adapters = _checked_checkpoint(args)
    if args.command == "embed":
        chosen["kind"] = _kind_of_folder(folder, args.kind)
    if args.command == "edit" and args.strength is not None and not (folder / "vae").is_dir():
        raise UsageError(f"--strength starts from the picture's latents, and {folder} has no vae/. Leave it out.")
    try:
        choose_device(args.device)
    except ValueError as error:
        raise UsageError(str(error)) from error
    digest = digest_of(folder, adapters, args.command in ("draw", "edit"))
    opening = {
        "folder": str(folder.absolute()),
        "adapters": [str(adapter.folder.absolute()) for adapter in adapters],
        "device": args.device,
        "dtype": args.dtype,
        "trust_remote_code": args.trust_remote_code,
    }
    model = {"name": " + ".join([args.model or DEFAULT_MODEL, *args.adapter]), "digest": digest}
    return Job(args.command, model, chosen | {"dtype": args.dtype}, opening)


def digest_of(folder: Path, adapters: Sequence[Adapter], with_decoder: bool) -> str:
    """Digits that stand for the files of a checkpoint and its adapters; read whole, because names say nothing."""
    files = folder.rglob("*") if with_decoder else folder.glob("*")
    wanted = sorted(path for path in files if path.suffix in DECIDING and path.is_file() and path.name != "job.json")
    for adapter in adapters:
        wanted += sorted(path for path in adapter.folder.glob("*") if path.suffix in DECIDING and path.is_file())
    return hash_files(wanted)


def _describe_options(args: argparse.Namespace) -> dict[str, Any]:
    if not all(question.strip() for question in args.questions or []):
        raise UsageError("a --question is empty. Write one, or leave the option out to get a description.")
    return {"questions": args.questions, "max_new_tokens": args.max_new_tokens}


def _draw_options(args: argparse.Namespace) -> dict[str, Any]:
    return {"num_images": args.num_images, **_drawing_options(args)}


def _edit_options(args: argparse.Namespace) -> dict[str, Any]:
    if args.strength is not None and not 0 < args.strength <= 1:
        raise UsageError(f"--strength is {args.strength:g}; expected a number above 0 and at most 1.")
    if args.instruction_for_all is not None and not args.instruction_for_all.strip():
        raise UsageError("--instruction is empty. Say what to change, or leave it out and let the records say it.")
    return {"instruction": args.instruction_for_all, "strength": args.strength, **_drawing_options(args)}


def _drawing_options(args: argparse.Namespace) -> dict[str, Any]:
    return {"seed": args.seed, "num_inference_steps": args.steps, "guidance_scale": args.guidance_scale}


def _embed_options(args: argparse.Namespace) -> dict[str, Any]:
    if args.approximate and not has_usearch():
        raise UsageError("--approximate needs usearch. Install it: pip install 'modeling-pisces[search]'.")
    return {}


def _kind_of_folder(folder: Path, kind: str | None) -> str:
    try:
        return check_kind(SimpleNamespace(config=PiscesConfig.from_pretrained(folder)), kind)
    except ValueError as error:
        raise UsageError(str(error)) from error


# ---- what is said of it


def _finish_index(args: argparse.Namespace, shards: Shards) -> dict[str, Any] | None:
    """Make the index of all shards; None where nothing could be embedded."""
    keys = [shards.key(number) for number in range(shards.count)]
    key = hashlib.sha256("".join(keys).encode()).hexdigest()[:24]
    parts = [(shards.path(number, ".npy"), shards.rows(number)) for number in range(shards.count)]
    num_rows = sum("error" not in row for _, rows in parts for row in rows)
    if not num_rows:
        print(f"pisces: error: {shards.folder}: no picture could be embedded, so there is no index", file=sys.stderr)
        return None
    graph = args.approximate or (num_rows > MANY_ROWS and has_usearch())
    if num_rows > MANY_ROWS and not graph:
        print(f"{num_rows} pictures: pip install 'modeling-pisces[search]' makes searching faster", file=sys.stderr)
    about = {"model": shards.job.model, "kind": shards.job.options["kind"], "dtype_of_model": args.dtype}
    try:
        return write_index(shards.folder, key, about, parts, graph)
    except ValueError as error:
        raise CommandFailed(str(error)) from error


def _tell(args: argparse.Namespace, shards: Shards, ours: list[int], head: dict[str, Any] | None) -> int:
    """Say what there is; return 0, 1 when some records failed, 2 when all did."""
    count, errors = tally(shards, ours)
    missing = len(shards.missing())
    summary = {
        "command": args.command,
        "output": str(shards.folder),
        "shards": shards.count,
        "missing": missing,
        "results": count,
        "errors": errors,
    }
    for row in errors[:5]:
        print(f"pisces: error: {row['id']}: {' '.join(row['error'].split())}", file=sys.stderr)
    if len(errors) > 5:
        print(f"pisces: error: and {len(errors) - 5} more; see {shards.folder / 'shards'}", file=sys.stderr)
    if args.json:
        print(json.dumps(summary | ({"index": head} if head else {})))
    else:
        print(f"{shards.folder}: {count} results in {len(ours)} of {shards.count} shards")
        if missing:
            print(f"{missing} shards are not made yet; other --shard parts make them", file=sys.stderr)
        if head:
            print(f"index: {head['rows']} pictures, {head['kind']}, {head['width']} numbers each")
    return 0 if not errors else 1 if count else 2


# ---- search


def _search(args: argparse.Namespace) -> int:
    index = SearchIndex(args.index)
    if not args.images and not args.texts:
        raise UsageError("nothing to look for. Give --image FILE, --text WORDS, or several of them.")
    if args.texts and KINDS[index.kind].texts is None:
        raise UsageError(f"{args.index} holds embeddings of kind {index.kind!r}, which know pictures only.")
    try:
        images = [load_image(name) for name in args.images or []]
    except OSError as error:
        raise UsageError(str(error)) from error
    model, processor = _model_of_index(args, index)
    found: list[tuple[str, str, list[Hit]]] = []
    sides: list[tuple[str, list[str], Callable[..., Vectors], list[Any]]] = [
        ("image", args.images, embed_images, images),
        ("text", args.texts, embed_texts, args.texts),
    ]
    for what, names, embed, given in sides:
        if given:
            queries = embed(model, processor, given, index.kind)
            rows = index.search(queries, args.top, approximate=not args.exact)
            found += [(what, name, row) for name, row in zip(names, rows, strict=True)]
    results = [
        {what: name, "hits": [{"score": hit.score, "row": hit.row, **hit.entry} for hit in hits]}
        for what, name, hits in found
    ]
    if args.json:
        print(json.dumps({"command": "search", "index": str(index.folder), "results": results}))
        return 0
    for _, name, hits in found:
        for hit in hits:
            print(f"{' '.join(name.split())}\t{hit.score:.4f}\t{hit.entry.get('image') or hit.entry['id']}")
    return 0


def _model_of_index(args: argparse.Namespace, index: SearchIndex) -> tuple[Any, Any]:
    """The model that made the index.

    Raises:
        UsageError: the one that is named is another one.
    """
    made_by = index.head["model"]
    names = [args.model, *args.adapter] if args.model else made_by["name"].split(" + ")
    args.model, args.adapter = names[0], names[1:] if not args.adapter else args.adapter
    folder, adapters = _checked_checkpoint(args)
    digest = digest_of(folder, adapters, with_decoder=False)
    if digest != made_by["digest"]:
        raise UsageError(
            f"{args.index} was made by {made_by['name']} (files {made_by['digest']}), and "
            f"{' + '.join([args.model, *args.adapter])} is another model (files {digest}): their vectors cannot be "
            "compared. Name the model of the index with --model, or make the index again."
        )
    opening = {
        "folder": str(folder.absolute()),
        "adapters": [str(adapter.folder) for adapter in adapters],
        "device": args.device,
        "dtype": index.head["dtype_of_model"] if args.dtype == "auto" else args.dtype,
        "trust_remote_code": args.trust_remote_code,
    }
    try:
        opened = open_model(opening, draws=False)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return opened.model, opened.processor


__all__ = ["run_many"]

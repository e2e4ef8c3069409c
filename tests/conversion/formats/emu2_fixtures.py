"""A small Emu2-Gen on disk, and its visual tower once more in plain torch.

The tower is written from its description (EVA-CLIP, arXiv 2303.15389: a vision transformer with one fused matrix for
queries, keys and values, biases on queries and values only, and layer norms behind attention and MLP) with the names
of the published weights, and shares no code with `modeling_pisces`. It says what Emu2 computes, names and all.
"""

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from tests.modeling_pisces.pipeline.pipeline_fixtures import make_unet, make_vae


# the published settings, from Emu2-Gen's multimodal_encoder/config.json
FULL_SIZE = {
    "image_size": 448,
    "patch_size": 14,
    "width": 1792,
    "layers": 64,
    "head_width": 112,
    "mlp_ratio": 8.571428571428571,
    "qkv_bias": True,
    "drop_path_rate": 0.0,
    "layer_norm_eps": 1e-6,
    "xattn": False,
    "postnorm": True,
    "n_query": 64,
    "v_query": 64,
}
SMALL_SIZE = FULL_SIZE | {
    "image_size": 16,
    "patch_size": 4,
    "width": 12,
    "layers": 3,
    "head_width": 6,
    "mlp_ratio": 2.5,
}


class EvaAttention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        width = x.shape[-1]
        query, key, value = self.qkv(x).split(width, dim=-1)
        query, value = query + self.q_bias, value + self.v_bias
        mixed = torch.empty_like(x)
        size = width // self.heads
        for head in range(self.heads):
            part = slice(head * size, (head + 1) * size)
            scores = torch.einsum("bqc,bkc->bqk", query[..., part], key[..., part]) / size**0.5
            mixed[..., part] = torch.einsum("bqk,bkc->bqc", scores.softmax(-1), value[..., part])
        return self.proj(mixed)


class EvaBlock(nn.Module):
    def __init__(self, width, heads, inner, eps):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps)
        self.attn = EvaAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, inner), "fc2": nn.Linear(inner, width)})

    def forward(self, x):
        x = x + self.norm1(self.attn(x))
        inner = self.mlp["fc1"](x)
        inner = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))  # the exact GELU
        return x + self.norm2(self.mlp["fc2"](inner))


class EvaTower(nn.Module):
    """`multimodal_encoder.model.visual` of Emu2-Gen, by the settings of its config."""

    def __init__(self, settings):
        super().__init__()
        width, side = settings["width"], settings["image_size"] // settings["patch_size"]
        heads, inner = width // settings["head_width"], int(width * settings["mlp_ratio"])
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, side * side + 1, width))
        patch = settings["patch_size"]
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, kernel_size=patch, stride=patch)})
        blocks = (EvaBlock(width, heads, inner, settings["layer_norm_eps"]) for _ in range(settings["layers"]))
        self.blocks = nn.ModuleList(blocks)

    def forward(self, pixels):
        """(I, 3, H, W) -> (I, n_query, width): without the class token, averaged over squares of the patch grid."""
        grid = self.patch_embed["proj"](pixels)
        images, width, side, _ = grid.shape
        x = torch.cat([self.cls_token.expand(images, 1, width), grid.flatten(2).mT], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return x[:, 1:].view(images, side, side, width)


def pool(grid, stride):
    """Average stride x stride squares, one by one."""
    side = grid.shape[1] // stride
    squares = [
        grid[:, y * stride : (y + 1) * stride, x * stride : (x + 1) * stride].mean((1, 2))
        for y in range(side)
        for x in range(side)
    ]
    return torch.stack(squares, dim=1)


def make_tower(settings=SMALL_SIZE, seed=0):
    torch.manual_seed(seed)
    tower = EvaTower(settings).eval()
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.normal_(std=0.3)
    return tower


def encoder_state(tower):
    """All of `multimodal_encoder/`: the tower and, much smaller than in life, what surrounds it."""
    state = {f"model.visual.{name}": tensor for name, tensor in tower.state_dict().items()}
    width = tower.cls_token.shape[-1]
    for name in ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "lm_head.weight"):
        state[f"model.decoder.lm.{name}"] = torch.zeros(8, 8)
    return state | {"project_up.weight": torch.zeros(8, width), "project_down.weight": torch.zeros(width, 8)}


def write_emu2_gen(folder: Path, settings=SMALL_SIZE, variant: str | None = "bf16", unet=None, dtype=torch.float32):
    """Write a diffusers-style repository laid out as BAAI/Emu2-Gen; returns its folder.

    The encoder comes in three shards of which two hold the tower, as the published one comes in more.
    """
    word = f".{variant}" if variant else ""
    encoder = folder / "multimodal_encoder"
    encoder.mkdir(parents=True)
    config = {"model_type": "Emu", "architectures": ["EmuForCausalLM"], "d_model": settings["width"]}
    (encoder / "config.json").write_text(json.dumps(config | {"vision_config": settings}))
    state = {name: tensor.to(dtype).contiguous() for name, tensor in encoder_state(make_tower(settings)).items()}
    tower = [name for name in state if name.startswith("model.visual.")]
    rest = [name for name in state if name not in tower]
    weight_map = {}
    for number, names in enumerate((tower[:20], tower[20:] + rest[:2], rest[2:]), start=1):
        file = f"model{word}-{number:05d}-of-00003.safetensors"
        save_file({name: state[name] for name in names}, encoder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = encoder / f"model.safetensors.index{word}.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    write_decoder_parts(folder, variant, {"cross_attention_dim": settings["width"], **(unet or {})}, dtype)
    return folder


def write_decoder_parts(folder: Path, variant: str | None, unet: dict, dtype=torch.float32):
    """`unet/`, `vae/` and `scheduler/` as diffusers saves them, SDXL's conditions included."""
    from diffusers import EulerDiscreteScheduler

    size = 8
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": size,
        "projection_class_embeddings_input_dim": unet["cross_attention_dim"] + 6 * size,
    }
    for name, model in {"unet": make_unet(**{**added, **unet}), "vae": make_vae()}.items():
        model = model if dtype == torch.float32 else model.to(dtype)
        model.save_pretrained(folder / name, variant=variant)
    settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    EulerDiscreteScheduler(**settings, steps_offset=1, timestep_spacing="leading").save_pretrained(
        folder / "scheduler"
    )


def serve(monkeypatch, repository: Path, cache: Path) -> list[str]:
    """Let `snapshot_download` give the files of a local folder, as the Hub would; returns the list of what was fetched."""
    fetched = []

    def snapshot_download(repo_id, revision, allow_patterns):
        snapshot = cache / f"models--{repo_id.replace('/', '--')}" / "snapshots" / revision
        for path in sorted(path for path in repository.rglob("*") if path.is_file()):
            name = path.relative_to(repository).as_posix()
            if any(fnmatch(name, pattern) for pattern in allow_patterns) and not (snapshot / name).exists():
                (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, snapshot / name)
                fetched.append(name)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return fetched

"""Claims about the gen-CLIP tower and pooling, against plain loops and against CLIP with the same weights."""

import pytest
import torch
from torch import nn
from transformers import AutoModel, CLIPVisionConfig, CLIPVisionModel

from modeling_pisces import PiscesGenVisionConfig, PiscesGenVisionModel, pool_patches


SMALL = {
    "hidden_size": 20,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}


def make_tower(**overrides) -> PiscesGenVisionModel:
    torch.manual_seed(0)
    tower = PiscesGenVisionModel(PiscesGenVisionConfig(**(SMALL | overrides))).eval()
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.normal_(std=0.3)
    return tower


def test_pooling_averages_each_square_row_major():
    patches = torch.randn(2, 36, 5)
    pooled = pool_patches(patches, 3)
    grid = patches.view(2, 6, 6, 5)
    for image in range(2):
        for row in range(2):
            for column in range(2):
                square = [grid[image, 3 * row + y, 3 * column + x] for y in range(3) for x in range(3)]
                expected = sum(square) / 9
                torch.testing.assert_close(
                    pooled[image, 2 * row + column], expected, rtol=0, atol=1e-6
                )  # measured: 0.0


def test_pooling_keeps_the_dtype_and_stride_one_changes_nothing():
    patches = torch.randn(1, 16, 3, dtype=torch.bfloat16)
    assert pool_patches(patches, 2).dtype == torch.bfloat16
    assert torch.equal(pool_patches(patches, 1), patches)


@pytest.mark.parametrize(("num_patches", "stride"), [(17, 2), (16, 3)])
def test_pooling_refuses_what_has_no_squares(num_patches, stride):
    with pytest.raises(ValueError, match=f"{num_patches} patches with stride {stride}.*class token"):
        pool_patches(torch.zeros(1, num_patches, 2), stride)


def plain_forward(tower: PiscesGenVisionModel, pixels: torch.Tensor) -> torch.Tensor:
    """The tower written out for one image, patch by patch and head by head."""
    config, parts = tower.config, dict(tower.named_parameters())
    size, width = config.patch_size, config.hidden_size
    tokens = []
    for top in range(0, config.image_size, size):
        for left in range(0, config.image_size, size):
            patch = pixels[:, top : top + size, left : left + size].flatten()
            weight = parts["embeddings.patch_embedding.weight"].flatten(1)
            tokens.append(weight @ patch + parts["embeddings.patch_embedding.bias"])
    if config.use_class_token:
        tokens.insert(0, parts["embeddings.class_embedding"])
    x = torch.stack(tokens) + parts["embeddings.position_embedding"]

    def attend(x, layer):
        heads = []
        query, key, value = (getattr(layer.self_attn, name)(x) for name in ("q_proj", "k_proj", "v_proj"))
        for head in range(config.num_attention_heads):
            part = slice(head * width // config.num_attention_heads, (head + 1) * width // config.num_attention_heads)
            scores = query[:, part] @ key[:, part].T / (width // config.num_attention_heads) ** 0.5
            heads.append(scores.softmax(-1) @ value[:, part])
        return layer.self_attn.out_proj(torch.cat(heads, dim=-1))

    for layer in tower.layers:
        mlp = lambda x, layer=layer: layer.mlp.fc2(nn.functional.gelu(layer.mlp.fc1(x)))  # noqa: E731
        if config.norm_position == "post":
            x = x + layer.layer_norm1(attend(x, layer))
            x = x + layer.layer_norm2(mlp(x))
        else:
            x = x + attend(layer.layer_norm1(x), layer)
            x = x + mlp(layer.layer_norm2(x))
    x = x[1:] if config.use_class_token else x
    return tower.output_projection(tower.final_norm(x))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "overrides",
    [
        {"norm_position": "post"},
        {"norm_position": "pre", "use_final_norm": True, "output_size": 12},
        {"norm_position": "pre", "use_class_token": False, "qkv_bias": False},
    ],
)
@torch.no_grad()
def test_tower_equals_a_plain_loop(overrides, attention):
    tower = make_tower(**overrides)
    tower.set_attn_implementation(attention)
    pixels = torch.randn(2, 3, 16, 16)
    vectors = tower(pixels).last_hidden_state
    assert vectors.shape == (2, 16, overrides.get("output_size") or 20)
    for image in range(2):
        # worst of 6 cases: 1.9e-6
        torch.testing.assert_close(vectors[image], plain_forward(tower, pixels[image]), rtol=0, atol=1e-5)


def test_pre_norm_tower_equals_clip_with_the_same_weights():
    clip = CLIPVisionModel(CLIPVisionConfig(**SMALL, hidden_act="gelu", layer_norm_eps=1e-6)).eval()
    source = clip.state_dict()
    # CLIP alone normalises its embeddings; an identity norm cannot be loaded, so its layers are compared after it
    tower = make_tower(norm_position="pre")
    names = {name: name.split("encoder.")[-1] for name in source if "encoder.layers" in name}
    missing, unexpected = tower.load_state_dict({new: source[old] for old, new in names.items()}, strict=False)
    assert not unexpected and all(name.startswith("embeddings.") for name in missing)
    x = torch.randn(2, 17, 20)
    expected = x
    for layer in getattr(clip, "vision_model", clip).encoder.layers:
        expected = layer(expected, attention_mask=None)
        expected = expected if isinstance(expected, torch.Tensor) else expected[0]
    for layer in tower.layers:
        x = layer(x)
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-5)  # measured: 0.0


def test_hidden_patches_do_not_reach_the_output_but_their_positions_do():
    tower = make_tower()
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[0, 5] = True  # grid row 1, column 1: pixels 4..8
    first = torch.randn(1, 3, 16, 16)
    second = first.clone()
    second[:, :, 4:8, 4:8] = 7.0
    with torch.no_grad():
        assert torch.equal(tower(first, mask).last_hidden_state, tower(second, mask).last_hidden_state)
        assert not torch.allclose(tower(first).last_hidden_state, tower(second).last_hidden_state)
        blank = torch.zeros_like(first)
        everywhere = tower(blank, torch.ones_like(mask)).last_hidden_state
    assert not torch.allclose(everywhere[0, 0], everywhere[0, 1])


def test_wrong_image_size_is_refused_with_both_sizes():
    with pytest.raises(ValueError, match=r"16 x 16 pixels, got \(12, 16\).*PiscesProcessor"):
        make_tower()(torch.zeros(1, 3, 12, 16))


def test_new_tower_has_finite_small_outputs_and_distinct_positions():
    tower = PiscesGenVisionModel(PiscesGenVisionConfig(**SMALL)).eval()
    assert 0.01 < tower.embeddings.position_embedding.std() < 0.03
    assert 0.005 < tower.embeddings.class_embedding.std() < 0.04
    with torch.no_grad():
        assert tower(torch.randn(2, 3, 16, 16)).last_hidden_state.abs().max() < 20


def test_hidden_states_and_attentions_are_recorded():
    tower = make_tower()
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        outputs = tower(torch.randn(1, 3, 16, 16), output_hidden_states=True, output_attentions=True)
    assert [tuple(state.shape) for state in outputs.hidden_states] == [(1, 17, 20)] * 3
    assert [tuple(weights.shape) for weights in outputs.attentions] == [(1, 2, 17, 17)] * 2
    torch.testing.assert_close(
        outputs.attentions[0].sum(-1), torch.ones(1, 2, 17), rtol=0, atol=1e-6
    )  # measured: 1.2e-7


def test_tower_trains_alone_with_equal_gradients_under_checkpointing():
    pixels = torch.randn(2, 3, 16, 16)
    gradients = []
    for checkpointing in (False, True):
        tower = make_tower(output_size=12).train()
        if checkpointing:
            tower.gradient_checkpointing_enable()
        tower(pixels).last_hidden_state.square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in tower.named_parameters()})
    assert all(gradient is not None for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        assert torch.equal(gradients[1][name], gradient), name


def test_saved_tower_loads_bit_equal(tmp_path):
    tower = make_tower(output_size=12)
    tower.save_pretrained(tmp_path)
    pixels = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        for loaded in (PiscesGenVisionModel.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
            assert torch.equal(loaded(pixels).last_hidden_state, tower(pixels).last_hidden_state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_fp32(dtype):
    tower, pixels = make_tower(use_final_norm=True, norm_position="pre"), torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        exact = tower(pixels).last_hidden_state
        rounded = tower.to(dtype)(pixels).last_hidden_state
    assert rounded.dtype == dtype
    # relative to the largest value; measured: 5.5e-3 (bf16), 5.6e-4 (fp16)
    assert (rounded.float() - exact).abs().max() / exact.abs().max() < {torch.bfloat16: 0.02, torch.float16: 0.002}[
        dtype
    ]

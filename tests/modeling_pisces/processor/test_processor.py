"""What `PiscesProcessor` promises: placeholders, pixels, masks, conversations, refusals, a folder that loads back."""

import base64
import copy
import io
import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaProcessor

from modeling_pisces import PiscesProcessor
from modeling_pisces.generation_pisces import PiscesGenerateOutput
from tests.fixtures import make_model, make_processor, make_tokenizer


N, M = 9, 4  # placeholders per image of make_processor()
DRAWN = "<|gen_start|>" + "<|gen_image|>" * M + "<|gen_end|>"


@pytest.fixture(scope="module")
def processor() -> PiscesProcessor:
    return make_processor()


def picture(seed: int = 0, size: tuple[int, int] = (20, 30)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def image(seed: int = 0) -> dict:
    return {"type": "image", "image": picture(seed)}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def user(*parts: dict) -> dict:
    return {"role": "user", "content": list(parts)}


def assistant(*parts: dict) -> dict:
    return {"role": "assistant", "content": list(parts)}


def prepare(processor, conversation, **settings):
    return processor.apply_chat_template(
        conversation, tokenize=True, return_dict=True, return_tensors="pt", **settings
    )


def assert_refused(call, *words: str) -> None:
    with pytest.raises(ValueError) as error:
        call()
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value), str(error.value)


# Placeholders and pixels


def test_a_user_image_becomes_bare_placeholders(processor):
    inputs = processor(text="see <|image|> now", images=picture())
    assert processor.decode(inputs["input_ids"][0]) == "<|begin_of_text|>see " + "<|image|>" * N + " now"


def test_a_drawn_image_becomes_delimited_placeholders(processor):
    inputs = processor(text="here: <|gen_image|>.", gen_images=picture())
    assert processor.decode(inputs["input_ids"][0]) == f"<|begin_of_text|>here: {DRAWN}."


def test_a_drawn_image_that_is_already_delimited_is_not_delimited_twice(processor):
    inputs = processor(text="here: <|gen_start|><|gen_image|><|gen_end|>.", gen_images=picture())
    assert processor.decode(inputs["input_ids"][0]) == f"<|begin_of_text|>here: {DRAWN}."


def test_each_path_has_its_own_image_processor(processor):
    inputs = processor(text="<|image|><|gen_image|>", images=picture(), gen_images=picture(), return_tensors="pt")
    shown = processor.image_processor(picture(), return_tensors="pt")["pixel_values"]
    drawn = processor.gen_image_processor(picture(), return_tensors="pt")["pixel_values"]
    assert inputs["pixel_values"].shape == (1, 3, 12, 12) and torch.equal(inputs["pixel_values"], shown)
    assert inputs["gen_pixel_values"].shape == (1, 3, 16, 16) and torch.equal(inputs["gen_pixel_values"], drawn)


def test_settings_of_one_call_reach_the_right_image_processor(processor):
    inputs = processor(
        text="<|image|><|gen_image|>",
        images=picture(),
        gen_images=picture(),
        images_kwargs={"do_normalize": False},
        gen_images_kwargs={"do_rescale": False, "do_normalize": False},
        return_tensors="pt",
    )
    assert 0 <= inputs["pixel_values"].min() and inputs["pixel_values"].max() <= 1
    assert inputs["gen_pixel_values"].max() > 1


def test_paths_pil_images_bytes_and_arrays_behave_equally(processor, tmp_path):
    picture().save(tmp_path / "picture.png")
    sources = [str(tmp_path / "picture.png"), tmp_path / "picture.png", (tmp_path / "picture.png").read_bytes()]
    sources += [picture(), np.asarray(picture()), torch.from_numpy(np.array(picture())).permute(2, 0, 1)]
    for source in sources:
        inputs = processor(text="<|image|> <|gen_image|>", images=source, gen_images=[source], return_tensors="pt")
        expected = processor(
            text="<|image|> <|gen_image|>", images=picture(), gen_images=picture(), return_tensors="pt"
        )
        assert torch.equal(inputs["pixel_values"], expected["pixel_values"])
        assert torch.equal(inputs["gen_pixel_values"], expected["gen_pixel_values"])


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (3, 50), (50, 3), (3, 3)])
def test_tiny_and_thin_pictures_keep_their_channels(processor, size):
    # 1 or 3 rows look like a channel dimension to code that guesses
    inputs = processor(images=picture(size=size), return_tensors="pt")
    resized = picture(size=size).resize((12, 12), Image.Resampling.BICUBIC)
    expected = torch.from_numpy(np.array(resized)).permute(2, 0, 1) / 127.5 - 1
    assert torch.allclose(inputs["pixel_values"][0], expected, atol=1e-6)


def test_images_stay_in_reading_order(processor):
    flat = [picture(seed) for seed in range(3)]
    texts = ["<|image|> and <|image|>", "<|image|>"]
    inputs = processor(text=texts, images=flat, return_tensors="pt")
    nested = processor(text=texts, images=[flat[:2], flat[2:]], return_tensors="pt")
    expected = torch.cat([processor(images=one, return_tensors="pt")["pixel_values"] for one in flat])
    assert torch.equal(inputs["pixel_values"], expected) and torch.equal(nested["pixel_values"], expected)


def test_rows_without_images_may_stand_beside_rows_with_images(processor):
    inputs = processor(text=["none", "<|image|>", ""], images=[[], [picture()], None and []], return_tensors="pt")
    assert inputs["pixel_values"].shape[0] == 1
    assert (inputs["input_ids"] == processor.image_token_id).sum(1).tolist() == [0, N, 0]


def test_a_batch_is_padded_on_the_left_when_tensors_are_asked_for(processor):
    inputs = processor(text=["a", "abc"], return_tensors="pt")
    assert inputs["attention_mask"].tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert [len(row) for row in processor(text=["a", "abc"])["input_ids"]] == [2, 4]  # lists stay as long as they are


def test_the_begin_token_is_not_doubled(processor):
    bos = processor.tokenizer.bos_token_id
    for prompt in ("hello", "<|begin_of_text|>hello"):
        assert processor(text=prompt)["input_ids"][0].count(bos) == 1
    assert prepare(processor, [user(text("hello"))])["input_ids"][0].tolist().count(bos) == 1


def test_pictures_alone_and_text_alone_are_allowed(processor):
    assert set(processor(images=picture())) == {"pixel_values"}
    assert set(processor(gen_images=picture())) == {"gen_pixel_values"}
    assert set(processor(text="a")) == {"input_ids", "attention_mask"}


def test_text_and_pixels_equal_those_of_llava(processor):
    llava = LlavaProcessor(
        image_processor=processor.image_processor,
        tokenizer=make_tokenizer(),
        patch_size=4,
        vision_feature_select_strategy="full",
        image_token="<|image|>",
    )
    prompts, shown = ["a <|image|> b <|image|>", "<|image|>"], [picture(seed) for seed in range(3)]
    ours = processor(text=prompts, images=shown, return_tensors="pt")
    theirs = llava(text=prompts, images=shown, return_tensors="pt", padding=True)
    assert set(ours) == set(theirs)
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name


# Drawing


def test_image_mode_ends_every_prompt_in_the_start_token(processor):
    inputs = processor(text=["a cat", "two<|gen_start|>"], generation_mode="image", return_tensors="pt")
    assert (inputs["input_ids"][:, -1] == processor.gen_start_token_id).all()
    assert (inputs["input_ids"] == processor.gen_start_token_id).sum(1).tolist() == [1, 1]


def test_the_empty_prompt_can_be_drawn(processor):
    inputs = processor(text="", generation_mode="image")
    assert processor.decode(inputs["input_ids"][0]) == "<|begin_of_text|><|gen_start|>"


def test_a_drawing_chat_ends_in_the_start_token(processor):
    chat = [user(text("a cat"))]
    settings = {"add_generation_prompt": True, "generation_mode": "image"}
    written = processor.apply_chat_template(chat, **settings)
    assert written.endswith("assistant<|end_header_id|>\n\n<|gen_start|>")
    assert processor.decode(prepare(processor, chat, **settings)["input_ids"][0]) == written


def test_drawn_vectors_can_stand_in_for_pixels(processor):
    vectors = torch.randn(2, M, 12)
    for form in (vectors, list(vectors), [[vectors[0]], [vectors[1]]]):
        inputs = processor(text=["<|gen_image|>", "<|gen_image|>"], gen_image_vectors=form, return_tensors="pt")
        assert torch.equal(inputs["gen_image_vectors"], vectors)
        assert (inputs["input_ids"] == processor.gen_image_token_id).sum(1).tolist() == [M, M]


def test_vectors_of_an_assistant_turn_are_put_back(processor):
    vectors = torch.randn(M, 12)
    chat = [user(text("a cat")), assistant(text("Here: "), {"type": "image", "image_vectors": vectors})]
    inputs = prepare(processor, [*chat, user(text("now a dog"))])
    assert torch.equal(inputs["gen_image_vectors"][0], vectors)
    assert DRAWN in processor.decode(inputs["input_ids"][0])


# Conversations


def test_the_default_template_is_llama_31s(processor):
    chat = [
        {"role": "system", "content": "Be brief."},
        user(image(), text("What is it?")),
        {"role": "assistant", "content": "A dog."},
        {"role": "user", "content": "Draw it."},
        assistant(text("Here: "), image(1)),
    ]
    assert processor.apply_chat_template(chat, add_generation_prompt=True) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n<|image|>What is it?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA dog.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nDraw it.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHere: <|gen_image|><|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_user_images_and_assistant_images_go_separate_ways(processor):
    chat = [user(image(0), image(1), text("mix")), assistant(image(2)), user(image(3)), assistant(text("ok"))]
    inputs = prepare(processor, chat)
    shown = processor(images=[picture(0), picture(1), picture(3)], return_tensors="pt")["pixel_values"]
    drawn = processor(gen_images=picture(2))["gen_pixel_values"]
    assert torch.equal(inputs["pixel_values"], shown)
    assert torch.equal(torch.as_tensor(inputs["gen_pixel_values"]), torch.as_tensor(np.array(drawn)))


def test_all_ways_to_name_an_image_in_a_message_are_equal(processor, tmp_path):
    picture().save(tmp_path / "p.png")
    buffer = io.BytesIO()
    picture().save(buffer, "PNG")
    encoded = base64.b64encode(buffer.getvalue()).decode()
    parts = [
        {"type": "image", "image": picture()},
        {"type": "image", "path": str(tmp_path / "p.png")},
        {"type": "image", "url": str(tmp_path / "p.png")},
        {"type": "image", "base64": encoded},
        {"type": "image", "image": None, "path": str(tmp_path / "p.png"), "text": None},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}},
    ]
    for part in parts:
        inputs = prepare(processor, [user(part, text("?"))])
        assert torch.equal(inputs["pixel_values"], processor(images=picture(), return_tensors="pt")["pixel_values"])


def test_a_picture_beside_the_conversation_fills_an_empty_part(processor):
    inputs = prepare(processor, [user({"type": "image"}, text("?"))], processor_kwargs={"images": [picture()]})
    assert inputs["pixel_values"].shape[0] == 1


def test_a_conversation_is_never_changed(processor):
    chat = [user({"type": "image_url", "image_url": {"url": "x.png"}}), {"role": "assistant", "content": None}]
    before = copy.deepcopy(chat)
    processor.apply_chat_template(chat)
    assert chat == before


def test_batches_and_single_conversations_give_the_same_rows(processor):
    chats = [[user(image(), text("a"))], [user(text("b")), assistant(image(1))]]
    batch = prepare(processor, chats)
    for row, chat in enumerate(chats):
        alone = prepare(processor, chat)["input_ids"][0]
        assert torch.equal(batch["input_ids"][row][-len(alone) :], alone)
    assert processor.apply_chat_template(chats)[1] == processor.apply_chat_template(chats[1])


def test_without_return_dict_only_ids_come_back(processor):
    ids = processor.apply_chat_template([user(text("a"))], tokenize=True, return_tensors="pt")
    assert torch.equal(ids, prepare(processor, [user(text("a"))])["input_ids"])


def test_assistant_masks_cover_exactly_what_the_assistant_wrote(processor):
    chats = [
        [
            user(image(), text("é 1")),
            assistant(text("ü "), image(1), text(" ok")),
            user(text("2")),
            assistant(text("y")),
        ],
        [user(text("3")), assistant(image(2))],
        [user(image(3), image(4)), assistant(text("z"))],
    ]
    inputs = prepare(processor, chats, return_assistant_tokens_mask=True)
    assert inputs["assistant_masks"].shape == inputs["input_ids"].shape
    covered = [
        processor.decode(ids[mask == 1])
        for ids, mask in zip(inputs["input_ids"], inputs["assistant_masks"], strict=True)
    ]
    assert covered == [f"ü {DRAWN} ok<|eot_id|>y<|eot_id|>", f"{DRAWN}<|eot_id|>", "z<|eot_id|>"]


def test_assistant_masks_are_exact_where_a_placeholder_touches_the_turn(processor):
    # a compact template: the user's image directly before the turn, a drawn image at its very end
    template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}<|gen_image|>{% endgeneration %}"
        "{% else %}<|image|>{% endif %}{% endfor %}"
    )
    chat = [user(image()), assistant(image()), user(image()), assistant(image())]
    inputs = prepare(processor, chat, chat_template=template, return_assistant_tokens_mask=True)
    assert inputs["assistant_masks"][0].tolist() == [0] + ([0] * N + [1] * (M + 2)) * 2  # begin token first


def test_assistant_masks_are_the_same_without_tensors_and_with_right_padding(processor):
    chats = [[user(image(), text("a")), assistant(image(1))], [user(text("b")), assistant(text("longer answer " * 9))]]
    tensors = prepare(processor, chats, return_assistant_tokens_mask=True, processor_kwargs={"padding_side": "right"})
    lists = processor.apply_chat_template(chats, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)[
        "assistant_masks"
    ]
    for tensor, row in zip(tensors["assistant_masks"].tolist(), lists, strict=True):
        assert tensor[: len(row)] == row and not any(tensor[len(row) :])


def test_template_variables_and_call_settings_are_told_apart(processor):
    template = "{% for m in messages %}{{ mood }}{{ m['content'] }}{% endfor %}"
    settings = {"chat_template": template, "mood": "glad ", "padding": "max_length", "max_length": 20}
    inputs = prepare(processor, [{"role": "user", "content": "day"}], **settings)
    assert inputs["input_ids"].shape == (1, 20)
    assert processor.decode(inputs["input_ids"][0], skip_special_tokens=True) == "glad day"


def test_the_final_message_can_be_continued(processor):
    chat = [user(text("a")), {"role": "assistant", "content": "It is"}]
    assert processor.apply_chat_template(chat, continue_final_message=True).endswith("\n\nIt is")
    drawing = processor.apply_chat_template(chat, continue_final_message=True, generation_mode="image")
    assert drawing.endswith("It is<|gen_start|>")


# Refusals


@pytest.mark.parametrize(
    ("texts", "images", "row", "found", "given"),
    [
        (["<|image|>"], [], 0, 1, 0),
        (["none"], 1, 0, 0, 1),
        (["<|image|><|image|>"], 1, 0, 2, 1),
        (["<|image|>"], 2, 0, 1, 2),
        (["<|image|>", "<|image|>"], 1, 1, 1, 0),
        (["<|image|>", "<|image|>"], 3, 1, 1, 2),
        (["<|image|><|image|>", "<|image|>"], 1, 0, 2, 1),
        (["<|image|>", "<|image|>"], [2, 0], 0, 1, 2),
        (["a", "<|image|><|image|>"], [1, 1], 0, 0, 1),
    ],
)
@pytest.mark.parametrize("kind", ["images", "gen_images"])
def test_wrong_image_counts_name_the_row_even_when_totals_agree(processor, kind, texts, images, row, found, given):
    def many(count):
        return [picture()] * count

    pictures = many(images) if isinstance(images, int) else [many(count) for count in images] or None
    token = "<|image|>" if kind == "images" else "<|gen_image|>"
    texts = [line.replace("<|image|>", token) for line in texts]
    expected = f"row {row}: found {found} {token} tokens but {given} {kind};"
    assert_refused(lambda: processor(text=texts, **{kind: pictures}), expected, "one list per row")


def test_a_wrong_number_of_lists_is_refused(processor):
    assert_refused(
        lambda: processor(text=["<|image|>"], images=[[picture()], []]), "2 lists of images", "1 rows of text"
    )


def test_wrong_counts_are_found_before_any_picture_is_opened(processor):
    assert_refused(lambda: processor(text="none", images="absent.png"), "row 0: found 0")


@pytest.mark.parametrize("token", ["<|image|>", "<|gen_image|>", "<|gen_start|>", "<|gen_end|>"])
@pytest.mark.parametrize("tokenize", [False, True])
def test_text_that_spells_a_placeholder_is_refused_with_row_turn_and_token(processor, token, tokenize):
    chats = [[user(text("fine"))], [user(text("fine")), user(text(f"sneaky {token}"))]]
    assert_refused(
        lambda: processor.apply_chat_template(chats, tokenize=tokenize), "row 1, turn 1 (user)", token, "remove"
    )
    plain = [{"role": "user", "content": f"also {token}"}]
    assert_refused(lambda: processor.apply_chat_template(plain, tokenize=tokenize), "row 0, turn 0 (user)", token)


@pytest.mark.parametrize(
    ("conversation", "words"),
    [
        ([], ["non-empty list of messages"]),
        ("hello", ["non-empty list of messages", "'hello'"]),
        ([{"content": "a"}], ["row 0, turn 0", "role"]),
        ([{"role": "user", "content": 3}], ["row 0, turn 0", "int"]),
        ([user({"type": "video", "video": "x.mp4"})], ["row 0, turn 0", "video", "neither text nor image"]),
        ([user({"type": "image", "path": "a", "url": "b"})], ["row 0, turn 0", "several sources", "Keep one"]),
        ([user({"type": "image", "base64": "@@"})], ["row 0, turn 0", "base64"]),
        ([user({"type": "image", "image_vectors": [[0.0]]})], ["row 0, turn 0 (user)", "assistant turns"]),
    ],
)
def test_malformed_conversations_are_refused_by_row_and_turn(processor, conversation, words):
    assert_refused(lambda: prepare(processor, conversation), *words)


def test_a_broken_picture_in_a_conversation_is_refused_by_name(processor, tmp_path):
    (tmp_path / "notes.png").write_text("no picture")
    chat = [user({"type": "image", "path": str(tmp_path / "notes.png")})]
    assert_refused(lambda: prepare(processor, chat), "notes.png", "not a picture")


def test_a_prompt_of_ten_thousand_words_keeps_every_word(processor):
    words = " ".join(f"word{index}" for index in range(10_000))
    ids = processor(text=words)["input_ids"][0]
    assert processor.decode(ids, skip_special_tokens=True) == words


def test_a_prompt_beyond_the_tokenizers_limit_is_refused_not_cut():
    processor = make_processor()
    processor.tokenizer.model_max_length = 50
    long = "word " * 10_000
    assert_refused(lambda: processor(text=["ok", long]), "row 1", "50001 tokens", "model_max_length 50", "truncation")
    assert len(processor(text=long, truncation=True, max_length=50)["input_ids"][0]) == 50


def test_truncation_that_would_cut_placeholders_is_refused(processor):
    for token, pictures in (("<|image|>", {"images": picture()}), ("<|gen_image|>", {"gen_images": picture()})):
        with pytest.raises(ValueError, match=r"Mismatch in `(gen_)?image` token count"):
            processor(text=f"abc {token}", truncation=True, max_length=8, **pictures)


def test_an_empty_prompt_without_a_begin_token_is_refused(processor):
    assert_refused(
        lambda: processor(text=["a", ""], add_special_tokens=False, return_tensors="pt"), "row 1", "empty", "character"
    )


def test_unknown_modes_and_unused_inputs_are_refused(processor):
    assert_refused(lambda: processor(text="a", generation_mode="picture"), "'picture'", "text, image, interleaved")
    assert_refused(lambda: processor(), "nothing to process")
    assert_refused(lambda: processor(text=[]), "non-empty list of strings")
    assert_refused(lambda: processor(text=[1]), "non-empty list of strings")
    assert_refused(lambda: processor(text="a", videos=[1]), "not videos")
    chat = [user(text("a"))]
    assert_refused(lambda: processor.apply_chat_template(chat, generation_mode="image"), "add_generation_prompt=True")
    assert_refused(
        lambda: processor.apply_chat_template(chat, sanitize_control_tokens=True), "sanitize_control_tokens"
    )


def test_vectors_of_the_wrong_shape_are_refused(processor):
    assert_refused(
        lambda: processor(text="<|gen_image|>", gen_image_vectors=torch.zeros(M + 1, 12)), "(5, 12)", "4 vectors"
    )
    assert_refused(
        lambda: processor(text="<|gen_image|>", gen_images=picture(), gen_image_vectors=torch.zeros(M, 12)),
        "both given",
    )


def test_a_tokenizer_without_the_special_tokens_is_refused(processor):
    parts = {"image_processor": processor.image_processor, "gen_image_processor": processor.gen_image_processor}
    assert_refused(
        lambda: PiscesProcessor(**parts, tokenizer=make_tokenizer(), gen_image_token="<|new|>"),
        "no special token <|new|>",
        "add_special_tokens",
    )
    assert_refused(
        lambda: PiscesProcessor(**parts, tokenizer=make_tokenizer(), num_image_tokens=0),
        "num_image_tokens=0",
        "config",
    )


# Understanding only


def test_an_understanding_only_processor_needs_no_drawing_side(processor, tmp_path):
    parts = {"image_processor": processor.image_processor, "tokenizer": make_tokenizer(), "num_image_tokens": N}
    reader = PiscesProcessor(**parts)
    reader.save_pretrained(tmp_path)
    for one in (reader, PiscesProcessor.from_pretrained(tmp_path)):
        assert not one.can_draw and "gen_pixel_values" not in one.model_input_names
        assert "pixel_values" in prepare(one, [user(image(), text("?"))])
        assert_refused(lambda: one(text="a", generation_mode="image"), "understanding-only", "gen_vision_config")  # noqa: B023
        assert_refused(lambda: one(text="a", gen_images=picture()), "understanding-only")  # noqa: B023


# Servers and generation


def test_serving_engines_get_the_counts_and_the_offsets(processor):
    data = processor._get_num_multimodal_tokens(image_sizes=[(10, 10), (500, 3)])
    assert data["num_image_tokens"] == [N, N] and data["num_image_patches"] == [1, 1]
    assert processor._get_num_multimodal_tokens()["num_image_tokens"] is None
    rows, offsets = processor.get_text_with_replacements(["a<|image|>b<|gen_image|>c"], ["<|image|>" * N])
    assert rows == ["a" + "<|image|>" * N + "b" + DRAWN + "c"]
    for report in offsets[0]:
        start, end = report["new_span"]
        assert rows[0][start:end] == report["replacement"]
    assert [(r["type"], r["span"]) for r in offsets[0]] == [("image", (1, 10)), ("gen_image", (11, 24))]
    assert processor.get_text_with_replacements(["a<|image|>"]) == (["a<|image|>"], [[]])


def test_model_input_names_are_what_the_model_takes(processor):
    assert processor.model_input_names == ["input_ids", "attention_mask", "pixel_values", "gen_pixel_values"]


def test_token_types_mark_understanding_images(processor):
    inputs = processor(
        text="a<|image|>b<|gen_image|>", images=picture(), gen_images=picture(), return_mm_token_type_ids=True
    )
    assert sum(inputs["mm_token_type_ids"][0]) == N


def test_text_output_is_decoded(processor):
    ids = processor(text=["hello", "you"], return_tensors="pt")["input_ids"]
    assert processor.post_process_multimodal_output(ids) == ["hello", "you"]
    assert processor.post_process_image_text_to_text(ids) == ["hello", "you"]
    assert processor.post_process_multimodal_output(ids, num_prompt_tokens=3)[0] == "llo"


def test_image_output_is_handed_on_and_mixed_up_modes_are_refused(processor):
    vectors, ids = torch.zeros(2, M, 12), torch.zeros(2, 5, dtype=torch.long)
    assert processor.post_process_multimodal_output(vectors, generation_mode="image") is vectors
    assert_refused(lambda: processor.post_process_multimodal_output(vectors), "3 dimensions", "PiscesPipeline")
    assert_refused(lambda: processor.post_process_multimodal_output(ids, generation_mode="image"), "2 dimensions")
    assert_refused(lambda: processor.post_process_multimodal_output(ids, generation_mode="interleaved"), "image_rows")
    assert_refused(lambda: processor.post_process_multimodal_output(ids, generation_mode="sound"), "'sound'")


def test_interleaved_output_becomes_the_parts_of_the_next_conversation(processor):
    texts = [f"P<|image|>{DRAWN}one{DRAWN}{DRAWN}", "Phello<|eot_id|>"]
    sequences = processor.tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")["input_ids"]
    vectors = torch.randn(3, M, 12)
    outputs = PiscesGenerateOutput(sequences=sequences, image_vectors=vectors, image_rows=torch.tensor([0, 0, 0]))
    rows = processor.post_process_multimodal_output(outputs, generation_mode="interleaved", num_prompt_tokens=2)
    assert [part["type"] for part in rows[0]] == ["image", "text", "image", "image"]
    assert rows[0][1]["text"] == "one" and torch.equal(rows[0][3]["image_vectors"], vectors[2])
    assert rows[1] == [{"type": "text", "text": "hello"}]
    again = prepare(processor, [user(text("draw")), {"role": "assistant", "content": rows[0]}])
    assert torch.equal(again["gen_image_vectors"], vectors)
    outputs.image_vectors = outputs.image_vectors[:1]
    outputs.image_rows = outputs.image_rows[:1]
    assert_refused(
        lambda: processor.post_process_multimodal_output(outputs, generation_mode="interleaved"), "num_prompt_tokens"
    )


def test_a_model_takes_what_the_processor_gives(processor):
    model = make_model()
    chats = [[user(image(), text("a")), assistant(text("b "), image(1))], [user(text("c")), assistant(text("d"))]]
    inputs = prepare(processor, chats, return_assistant_tokens_mask=True)
    masks = inputs.pop("assistant_masks")
    outputs = model(**inputs, labels=inputs["input_ids"].masked_fill(masks == 0, -100))
    assert torch.isfinite(outputs.text_loss) and torch.isfinite(outputs.image_loss)
    prompt = prepare(processor, [user(text("a cat"))], add_generation_prompt=True, generation_mode="image")
    assert model.generate(**prompt, generation_mode="image").shape[:2] == (1, M)


# The folder


def test_a_saved_processor_loads_back_exactly(processor, tmp_path):
    template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    saved = make_processor(chat_template=template, image_size=8, num_image_tokens=5, num_gen_image_tokens=3)
    saved.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"processor_config.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}
    for loaded in (PiscesProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert type(loaded) is PiscesProcessor
        assert loaded.to_dict() == saved.to_dict() and loaded.chat_template == template
        assert type(loaded.gen_image_processor) is type(saved.gen_image_processor)
        loaded.save_pretrained(tmp_path / "again")
        for name in names - {"tokenizer_config.json"}:  # transformers notes in it that it was loaded from a folder
            assert (tmp_path / "again" / name).read_text() == (tmp_path / name).read_text(), name
        settings = {"images": picture(), "gen_images": picture(1), "return_tensors": "pt"}
        ours, theirs = (one(text="a <|image|> é <|gen_image|>", **settings) for one in (saved, loaded))
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_loading_warns_about_nothing(processor, tmp_path, caplog):
    processor.save_pretrained(tmp_path)
    AutoProcessor.from_pretrained(tmp_path)
    assert not caplog.records


def test_other_names_of_the_special_tokens_are_kept(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|seen|>", "<|drawn|>"]})
    first = make_processor()
    saved = PiscesProcessor(
        first.image_processor,
        first.gen_image_processor,
        tokenizer,
        num_image_tokens=2,
        num_gen_image_tokens=1,
        image_token="<|seen|>",
        gen_image_token="<|drawn|>",
    )
    saved.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "processor_config.json").read_text())["image_token"] == "<|seen|>"
    loaded = AutoProcessor.from_pretrained(tmp_path)
    written = loaded.decode(prepare(loaded, [user(image()), assistant(image(1))])["input_ids"][0])
    assert "<|seen|><|seen|>" in written and "<|gen_start|><|drawn|><|gen_end|>" in written


def test_ordinary_use_warns_about_nothing(processor, caplog):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare(processor, [user(image(), text("a"))], add_generation_prompt=True, generation_mode="image")
        processor(text="a <|image|><|gen_image|>", images=picture(), gen_images=picture(), return_tensors="pt")
    assert not caplog.records


# ---- found by `python -m tests.fuzz --surface processor`


@pytest.mark.parametrize(
    ("vectors", "match"),
    [
        ("x", "gen_image_vectors 0: a str that holds no numbers"),
        ({}, "gen_image_vectors 0: a dict that holds no numbers"),
        (np.array([None]), "gen_image_vectors 0: a ndarray that holds no numbers"),
        (torch.ones(4, 12).long(), "dtype torch.int64, .*; expected finite floats"),
        (torch.full((4, 12), float("nan")), "or values that are not finite"),
        (torch.ones(4, 12).to("meta"), "device meta"),
        (torch.ones(4, 12).to_sparse(), "layout torch.sparse_coo"),
    ],
)
@pytest.mark.parametrize("way", ["call", "chat"])
def test_vectors_of_a_drawing_are_finite_floats(vectors, match, way):
    processor = make_processor()
    with pytest.raises(ValueError, match=match) as error:
        if way == "call":
            processor(text="a <|gen_image|>", gen_image_vectors=[vectors])
        else:
            part = {"type": "image", "image_vectors": vectors}
            chat = [{"role": "user", "content": "draw"}, {"role": "assistant", "content": [part]}]
            processor.apply_chat_template(chat, tokenize=True)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("ids", [[-100, 5], [2**70], ["a"], None, torch.tensor([[-100]]), object(), [1.5]])
@pytest.mark.parametrize("name", ["decode", "batch_decode", "post_process_image_text_to_text"])
def test_what_is_no_token_id_is_not_read_as_text(name, ids):
    with pytest.raises(ValueError, match=r"no token ids that can be read as text .* Replace -100"):
        getattr(make_processor(), name)(ids)


@pytest.mark.parametrize("text", [None, 3, ["a"], b"x"])
def test_control_tokens_are_looked_for_in_one_string(text):
    with pytest.raises(ValueError, match="expected one string"):
        make_processor().find_control_tokens(text)


def test_a_framework_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="return_tensors='xx': expected one of pt, np"):
        make_processor()(text="a", return_tensors="xx")

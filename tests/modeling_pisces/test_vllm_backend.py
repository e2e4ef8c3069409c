"""Claims about vLLM's own source: all that its Transformers backend asks for is here, and its code runs on our classes.

`make test-vllm` downloads the source; without it these tests skip. `test_serving_engines.py` holds the same by heart.
"""

import ast
import inspect
from types import SimpleNamespace

import pytest
import torch
import transformers
from packaging.version import Version
from PIL import Image
from transformers import AutoModel

import pisces_vllm_plugin
from tests.clients import vllm_source
from tests.fixtures import make_config, make_model, make_processor


SOURCE = vllm_source.find_source()
pytestmark = pytest.mark.skipif(SOURCE is None, reason="no source of vLLM here; `make test-vllm` downloads it")
# asked only of models that have them: our model has pictures and neither sound, video nor positions in three dimensions
NOT_OURS = {
    ("model", "get_audio_features"): "models that hear",
    ("model", "get_rope_index"): "M-RoPE models (`uses_mrope`)",
    ("processor", "audio_processor"): "looked for; its absence means that nothing is heard",
    ("processor", "boi_token"): "Gemma 3, by the name of its class",
    ("processor", "video_processor"): "models that see videos, after `hasattr`",
    ("text config", "sliding_window"): "layers of the type sliding_attention",
}


@pytest.fixture(scope="module")
def model():
    """As the backend builds it: from the configuration alone."""
    torch.manual_seed(0)
    return AutoModel.from_config(make_config()).eval()


@pytest.fixture(scope="module")
def subjects(model):
    processor = make_processor()
    return {
        "model": model,
        "config": model.config,
        "text config": model.config.get_text_config(),
        "processor": processor,
        "image processor": processor.image_processor,
        "tokenizer": processor.tokenizer,
    }


# ---- questions


def test_what_the_backend_asks_for_is_there(subjects):
    """A release of vLLM that asks for something new fails here, by the name of what it asks for."""
    missing = [
        f"{subject}: {' or '.join(names)}"
        for subject, names, may_be_absent in vllm_source.questions(SOURCE)
        if not may_be_absent
        and not any(hasattr(subjects[subject], name) for name in names)
        and not any((subject, name) in NOT_OURS for name in names)
    ]
    assert not missing


def test_every_kind_of_object_is_asked_for_something():
    """Otherwise the names in the source have changed, and the test above looks at nothing."""
    asked = vllm_source.questions(SOURCE)
    assert {subject for subject, _, _ in asked} == {*vllm_source._SUBJECTS.values()}
    names = {name for _, names, _ in asked for name in names}
    assert {"get_image_features", "get_decoder", "get_encoder", "_get_num_multimodal_tokens", "tp_plan"} <= names


def test_what_is_not_ours_is_still_asked_for():
    asked = {(subject, name) for subject, names, _ in vllm_source.questions(SOURCE) for name in names}
    assert set(NOT_OURS) <= asked


def test_the_keywords_of_its_calls_are_taken(subjects):
    calls = vllm_source.keywords_of_calls(SOURCE)
    assert ("model", "inputs_embeds") in calls and ("processor._get_num_multimodal_tokens", "image_sizes") in calls
    for callee, keyword in calls:
        subject, _, method = callee.partition(".")
        if (subject, method) in NOT_OURS:
            continue
        target = getattr(subjects[subject], method) if method else subjects[subject].forward
        parameters = inspect.signature(target).parameters
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        assert keyword in parameters or takes_all, f"{callee}({keyword}=)"


def test_the_plugin_writes_what_the_registry_knows():
    """The group of entry points, the backend's class and the two methods of the registry that the plugin calls."""
    package = SOURCE / "vllm"
    assert '"vllm.general_plugins"' in (package / "plugins" / "__init__.py").read_text(encoding="utf-8")
    registry = ast.parse((package / "model_executor" / "models" / "registry.py").read_text(encoding="utf-8"))
    methods = {node.name for node in ast.walk(registry) if isinstance(node, ast.FunctionDef)}
    assert {"get_supported_archs", "register_model"} <= methods
    strings = {node.value for node in ast.walk(registry) if isinstance(node, ast.Constant)}
    assert pisces_vllm_plugin.BACKEND in strings
    init = ast.parse(vllm_source.backend_file(SOURCE, "__init__").read_text(encoding="utf-8"))
    assert pisces_vllm_plugin.BACKEND in {node.name for node in ast.walk(init) if isinstance(node, ast.ClassDef)}


# ---- its code


@pytest.fixture(scope="module")
def backend_modules():
    try:
        with vllm_source.imported_backend(SOURCE) as modules:
            yield modules
    except ImportError as error:
        # 0.33.0 takes transformers >= 5.16.1, < 5.21
        assert Version(transformers.__version__) >= Version("5.21"), "the backend must import on versions it supports"
        pytest.skip(f"this vLLM does not take transformers {transformers.__version__}: {error}")


@pytest.fixture
def backend(backend_modules, model):
    """The backend's model around ours, without the layers of vLLM that it would put in."""
    _, multimodal = backend_modules
    wrapper = multimodal.MultiModalMixin.__new__(multimodal.MultiModalMixin)
    torch.nn.Module.__init__(wrapper)
    wrapper.model, wrapper.config, wrapper.text_config = model, model.config, model.config.get_text_config()
    wrapper.pp_group = SimpleNamespace(is_first_rank=True, is_last_rank=True, world_size=1)
    wrapper.model_config = SimpleNamespace(uses_mrope=False, dtype=torch.float32)
    wrapper._output_aux_hidden_states_kwargs = {}
    return wrapper


@pytest.fixture
def inputs():
    processor = make_processor()
    pictures = [Image.new("RGB", (20, 30), color) for color in ("red", "blue")]
    return processor(text=f"{processor.image_token * 2}what?", images=pictures, return_tensors="pt")


def test_its_own_code_tells_our_encoder_from_our_decoder(backend, model):
    found = backend._find_encoder_classes(model)  # for "video" transformers gives the same tower; nobody sends videos
    assert found["image"] is type(model.vision_tower) and set(found) <= {"image", "video"}
    assert set(found.values()) == {type(model.vision_tower)}
    assert type(model.get_decoder()) is type(model.language_model)


def test_its_own_code_embeds_pictures_and_gives_the_hidden_states_of_forward(backend, model, inputs):
    with torch.no_grad():
        expected = model(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"]).last_hidden_state[0]
        features = backend.embed_multimodal(
            pixel_values=inputs["pixel_values"], num_image_patches=torch.tensor([1, 1])
        )
        assert [tuple(rows.shape) for rows in features] == [(9, 32), (9, 32)]
        embeds = backend.embed_input_ids(inputs["input_ids"][0])
        embeds[inputs["input_ids"][0] == model.config.image_token_id] = torch.cat(list(features))
        found = backend.forward(None, torch.arange(len(embeds)), inputs_embeds=embeds)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_the_only_table_of_words_it_finds_is_the_language_models(backend, model):
    assert backend._vocab_embeddings() == {model.language_model.get_input_embeddings()}


def test_its_renaming_brings_every_weight_of_a_checkpoint_home(backend, backend_modules, model, monkeypatch):
    """Those of the wrapped model and of the head, which the backend adds itself; it reads no file without one."""
    recorded = []
    backend._maybe_apply_model_mapping = lambda: None
    monkeypatch.setattr(backend_modules[0], "WeightsMapper", lambda **rules: recorded.append(rules))
    backend._create_hf_to_vllm_mapper()
    (rules,) = recorded

    def renamed(name):
        for renaming in rules["orig_to_new_renaming"]:
            name, _ = renaming.rename_source_key(name)
        for pattern, new in rules["orig_to_new_regex"].items():
            if pattern.search(name):
                if new is None:
                    return None
                name = pattern.sub(new, name)
        return name

    checkpoint = make_model()
    found = {renamed(name) for name in checkpoint.state_dict()}
    assert found == {f"model.{name}" for name in model.state_dict()} | {"lm_head.weight"}


@pytest.fixture
def processing(backend_modules):
    """The backend's processor around ours."""
    _, multimodal = backend_modules
    info = multimodal.MultiModalProcessingInfo.__new__(multimodal.MultiModalProcessingInfo)
    processor = make_processor()
    info.get_hf_processor = lambda **options: processor
    info.get_tokenizer = lambda: processor.tokenizer
    info.ctx = SimpleNamespace(
        model_config=SimpleNamespace(get_multimodal_config=lambda: SimpleNamespace(mm_processor_kwargs=None)),
        get_merged_mm_kwargs=lambda options: options,
        call_hf_processor=lambda called, data, options: called(**data, **options, return_tensors="pt"),
    )
    return SimpleNamespace(module=multimodal, info=info, processor=processor)


def test_its_own_code_sees_pictures_only_and_counts_their_tokens(processing):
    info = processing.info
    assert info._get_supported_modalities() == ["image"]
    assert info.get_mm_max_tokens_per_item(4096, {"image": 2}) == {"image": 9}


def test_its_own_code_cuts_the_processors_output_into_pictures(processing):
    module, info, processor = processing.module, processing.info, processing.processor
    dummy = module.MultiModalDummyInputsBuilder.__new__(module.MultiModalDummyInputsBuilder)
    dummy.info = info
    text = dummy.get_dummy_text({"image": 2})
    assert text == processor.image_token * 2
    pictures = [Image.new("RGB", (224, 224), color) for color in ("red", "blue")]
    wrapper = module.MultiModalProcessor.__new__(module.MultiModalProcessor)
    wrapper.info, wrapper.dummy_inputs = info, dummy
    wrapper._get_hf_mm_inputs = lambda items, options: ({"text": text, "images": pictures}, {}, {})
    wrapper._finalize_hf_mm_data = lambda data, options, passed, found=None: found
    found = wrapper._apply_hf_processor_main(None, {})
    assert found["num_image_patches"].tolist() == [1, 1] and found["image_replacement_sizes"].tolist() == [9, 9]
    token = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    assert found["image_replacement_ids"].tolist() == [token] * 18
    assert found["pixel_values"].shape[0] == 2
    fields = wrapper._get_mm_fields_config(found, {})
    known = {"pixel_values", "num_image_patches", "image_replacement_ids", "image_grid_thw"}
    assert set(fields) == known  # nothing whose rows it would have to guess

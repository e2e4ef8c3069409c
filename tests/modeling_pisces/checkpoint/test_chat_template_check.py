"""A chat template that fails, loops or grows is refused when a checkpoint is loaded, in one line and in seconds."""

import time

import pytest
import torch

from modeling_pisces.checkpoint import chat_template as check
from modeling_pisces.checkpoint.chat_template import check_chat_template
from modeling_pisces.checkpoint.loading import load_model
from tests.fixtures import make_model, make_processor


HOSTILE = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "doubles": "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "one huge product": "{{ 'a' * 99999999999 }}",
    "one huge number": "{{ 9 ** (9 ** 9) }}",
    "one huge field": "{{ '%99999999999d' % 1 }}",
    "a macro that calls itself twice": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "loops only for pictures": "{% for m in messages %}{% for p in m.content %}{% if p.type == 'image' %}"
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{% endif %}{% endfor %}{% endfor %}",
}
BROKEN = {
    "{% for m in messages %}": "TemplateSyntaxError",
    "{{ nothing.at_all }}": "UndefinedError",
    "{{ raise_exception('only\nfor robots') }}": "TemplateError: only for robots",
    "{{ messages.__class__.__mro__ }}": "SecurityError",
    "{{ 1 / 0 }}": "ZeroDivisionError",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "RecursionError",
}


@pytest.fixture
def small_limits(monkeypatch):
    monkeypatch.setattr(check, "MAX_SECONDS", 1)


@pytest.mark.parametrize("template", HOSTILE.values(), ids=HOSTILE)
def test_a_template_without_end_or_measure_is_refused_in_seconds(template, small_limits):
    start = time.monotonic()
    with pytest.raises(
        ValueError, match=r"chat template cannot be used: (it needs more than (1 s or )?512 MiB|OverflowError)"
    ):
        check_chat_template(make_processor(chat_template=template))
    assert time.monotonic() - start < 20


def test_a_text_that_is_too_long_is_refused(monkeypatch):
    template = (
        "{% for i in range(20000) %}{{ 'a long text again and again ' ~ 'and again and again and again' }}{% endfor %}"
    )
    with pytest.raises(ValueError, match=r"it makes 1\d{6} characters of .*a red circle.*, more than 1000000"):
        check_chat_template(make_processor(chat_template=template))


@pytest.mark.parametrize("platform", ["linux", "win32"])
@pytest.mark.parametrize(("template", "words"), BROKEN.items())
def test_a_template_with_an_error_is_named_in_one_line(template, words, platform, monkeypatch):
    if platform == "linux" and check.sys.platform != "linux":
        pytest.skip("needs a child process of Linux")
    monkeypatch.setattr(check.sys, "platform", platform)
    with pytest.raises(
        ValueError, match=f"the chat template cannot be used: .*{words}.* Take chat_template"
    ) as caught:
        check_chat_template(make_processor(chat_template=template))
    assert "\n" not in str(caught.value)


def test_good_templates_pass_and_leave_the_process_as_it_was():
    import resource

    limits = [resource.getrlimit(kind) for kind in (resource.RLIMIT_AS, resource.RLIMIT_CPU)]
    check_chat_template(make_processor())
    check_chat_template(make_processor(chat_template="{{ messages[0].content[-1].text }}"))
    assert limits == [resource.getrlimit(kind) for kind in (resource.RLIMIT_AS, resource.RLIMIT_CPU)]
    assert torch.ones(2).sum() == 2


def test_loading_names_the_folder_and_the_template(tmp_path):
    make_model().save_pretrained(tmp_path)
    make_processor().save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ nothing.at_all }}")
    with pytest.raises(ValueError, match=r"the chat template cannot be used: UndefinedError") as caught:
        load_model(tmp_path, device="cpu")
    assert str(caught.value).startswith(f"{tmp_path}: ")

"""Claims about `tests/mixins`: whatever is skipped there by hand has a reason that says why, in words of its own."""

import ast
from pathlib import Path

import pytest


FILES = sorted((Path(__file__).parent / "mixins").glob("*.py"))
SKIPS = {"skip": 0, "skipIf": 1, "skipUnless": 1, "skipTest": 0}  # the position of the reason


def constants_of(tree: ast.Module) -> dict[str, str]:
    """Module-level names that stand for a text."""
    return {
        node.targets[0].id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    }


def chosen_reasons(tree: ast.Module, name: str) -> list[tuple[int, str]]:
    """(line, reason) of each text that a function of the module returns, if its result is put into `name`."""
    calls = [n.value for n in ast.walk(tree) if isinstance(n, ast.NamedExpr) and n.target.id == name]
    functions = {getattr(call.func, "id", None) for call in calls if isinstance(call, ast.Call)}
    bodies = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in functions]
    returns = [node for body in bodies for node in ast.walk(body) if isinstance(node, ast.Return)]
    return [(n.lineno, n.value.value) for n in returns if isinstance(getattr(n.value, "value", None), str)]


def reasons_in(text: str) -> list[tuple[int, str]]:
    """(line, reason) of each skip; "" for one without a reason that can be read here."""
    tree = ast.parse(text)
    names, found = constants_of(tree), []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            # a bare `@unittest.skip` or `pytest.mark.skip` has no reason at all
            for decorator in getattr(node, "decorator_list", []):
                if isinstance(decorator, ast.Attribute) and decorator.attr in SKIPS:
                    found.append((decorator.lineno, ""))
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", None))
        if name not in SKIPS:
            continue
        given = [keyword.value for keyword in node.keywords if keyword.arg in ("reason", "msg")]
        given += node.args[SKIPS[name] : SKIPS[name] + 1]
        reason = given[0] if given else None
        if isinstance(reason, ast.Name) and reason.id not in names:
            found += chosen_reasons(tree, reason.id) or [(node.lineno, "")]
        elif isinstance(reason, ast.Name):
            found.append((node.lineno, names[reason.id]))
        else:
            found.append((node.lineno, reason.value if isinstance(reason, ast.Constant) else ""))
    return found


def empty_overrides_in(text: str) -> list[str]:
    """Tests that are switched off by an empty body, without a skip."""
    tests = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")]
    return [
        test.name
        for test in tests
        if not test.decorator_list and all(isinstance(part, ast.Pass | ast.Expr) for part in test.body[-1:])
        if isinstance(test.body[-1], ast.Pass) or isinstance(test.body[-1].value, ast.Constant)
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_skip_in_a_mixin_file_says_why(path):
    text = path.read_text(encoding="utf-8")
    short = [f"{path.name}:{line}: {reason!r}" for line, reason in reasons_in(text) if len(reason.split()) < 6]
    assert not short, "a reason has at least six words"
    assert not empty_overrides_in(text), "a test that is overridden with nothing looks as if it had passed"


def test_no_two_skips_of_a_file_share_a_reason_by_accident():
    """The same words for different tests are a sign that nobody looked; a shared reason is a named constant."""
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        named = set(constants_of(ast.parse(text)).values())
        reasons = [reason for _, reason in reasons_in(text) if reason not in named]
        assert len(reasons) == len(set(reasons)), path.name


@pytest.mark.parametrize(
    "text",
    [
        "@unittest.skip\ndef test_a(self): pass",
        "@unittest.skip('not supported')\ndef test_a(self): pass",
        "@unittest.skipUnless(HAS, SOMETHING_UNKNOWN)\ndef test_a(self): pass",
        "def test_a(self):\n    self.skipTest('no')",
    ],
)
def test_the_reader_of_reasons_finds_what_is_missing(text):
    assert [reason for _, reason in reasons_in(text) if len(reason.split()) < 6]


def test_the_reader_of_reasons_finds_an_empty_override():
    assert empty_overrides_in("class A:\n    def test_a(self):\n        pass") == ["test_a"]
    assert empty_overrides_in("class A:\n    def test_a(self):\n        'nothing'") == ["test_a"]
    assert not empty_overrides_in("class A:\n    def test_a(self):\n        super().test_a()")

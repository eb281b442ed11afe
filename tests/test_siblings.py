"""The two scripts share their pieces word for word; what differs is listed here, so that a new difference fails."""

import ast
import difflib

from conftest import ROOT, TESTS, paper, tuned

DIFFERENT = {
    "Args": "learning rates, weight decay, noise, batch normalisation, initialisation, pixels, and the defaults",
    "QNetwork": "400-300, action at the second layer, batch normalisation, initialisation, pixels",
    "Actor": "400-300, batch normalisation, initialisation, pixels",
    "update": "batch normalisation's mode",
    "check_args": "the flags that differ",
    "make_env": "pixels",
    "main": "see main.diff",
}
ONLY_TUNED = {"GaussianNoise"}
ONLY_PAPER = {"init_weights", "Convolutions", "input_layers", "OrnsteinUhlenbeckNoise"}
ONLY_PAPER |= {"PixelObservation", "PixelReplayBuffer"}


def definitions(script) -> dict[str, str]:
    """Every top-level statement after the docstring, by name (imports and the guard by their text)."""
    source = (ROOT / f"{script.SCRIPT}.py").read_text()
    found = {}
    for node in ast.parse(source).body[1:]:
        text = ast.get_source_segment(source, node)
        decorators = "".join(f"@{ast.unparse(d)}\n" for d in getattr(node, "decorator_list", []))
        name = node.targets[0].id if isinstance(node, ast.Assign) else getattr(node, "name", text)
        found[name] = decorators + text
    return found


def test_shared_definitions_are_word_for_word_the_same():
    one, other = definitions(tuned), definitions(paper)
    imports = "from typing import Annotated, NamedTuple", "from typing import Annotated, Literal, NamedTuple"
    assert set(one) - set(other) == ONLY_TUNED | {imports[0]}
    assert set(other) - set(one) == ONLY_PAPER | {imports[1]}
    assert {name for name in set(one) & set(other) if one[name] != other[name]} == set(DIFFERENT)


def test_shared_definitions_come_in_the_same_order():
    one, other = definitions(tuned), definitions(paper)
    assert [name for name in one if name in other] == [name for name in other if name in one]


def differences(script_a, script_b, name) -> list[str]:
    lines = [definitions(script)[name].splitlines() for script in (script_a, script_b)]
    return [line for line in difflib.unified_diff(*lines, n=0, lineterm="") if line[:2] not in ("--", "++", "@@")]


def main_diff() -> str:
    return "".join(f"{line}\n" for line in differences(tuned, paper, "main"))


def test_the_two_main_functions_differ_as_listed():
    """main.diff is the list of algorithmic differences in main; a fix goes into both scripts at once."""
    fix = "python tests/test_siblings.py > tests/main.diff"
    assert main_diff() == (TESTS / "main.diff").read_text(), f"if the change is meant: {fix}"


def test_shared_flags_mean_the_same():
    """The same name, type and place, and the same words but for where a default comes from."""
    fields = [
        {
            node.target.id: (ast.unparse(node.annotation), doc.value.value.split(" (")[0])
            for node, doc in zip(body[::2], body[1::2], strict=True)
        }
        for body in (
            [
                node
                for node in ast.parse(definitions(script)["Args"]).body[0].body
                if isinstance(node, ast.AnnAssign | ast.Expr)
            ]
            for script in (tuned, paper)
        )
    ]
    shared = [name for name in fields[0] if name in fields[1]]
    assert shared == [name for name in fields[1] if name in fields[0]]
    differing = {name for name in shared if fields[0][name] != fields[1][name]}
    assert differing == {"batch_size"}
    assert set(fields[0]) - set(fields[1]) == {"learning_rate", "exploration_noise"}


if __name__ == "__main__":
    print(main_diff(), end="")

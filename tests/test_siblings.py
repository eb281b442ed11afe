"""The two scripts share their pieces word for word; what differs is listed here, so that a new difference fails."""

import ast
import difflib

from conftest import ROOT, TESTS, paper, tuned

MARK = "\n# From here on: "
DIFFERENT = """Args QNetwork QNetwork.__init__ QNetwork.forward Actor Actor.__init__ Actor.forward Batch DDPG.__init__
DDPG.act DDPG.explore DDPG.critic_loss DDPG.diagnostics DDPG.update wrap main"""  # above the mark
ONLY_TUNED = {"NStep", "GaussianNoise", "ParameterNoise", "DDPG.anneal_noise"}
ONLY_PAPER = {"init_weights", "Convolutions", "PixelObservation", "PixelReplayBuffer", "Args.__post_init__"}


def halves(script) -> tuple[str, str]:
    """The algorithm, and what surrounds it."""
    source = (ROOT / f"{script.SCRIPT}.py").read_text()
    assert source.count(MARK) == 1
    return source[: source.index(MARK)], source[source.index(MARK) :]


def definitions(script) -> dict[str, str]:
    """Every statement of the algorithm's half after the docstring, by name; of a class, each method as Class.method."""
    source, found = halves(script)[0], {}

    def text_of(node) -> str:
        decorators = "".join(f"@{ast.unparse(decorator)}\n" for decorator in getattr(node, "decorator_list", []))
        return decorators + "\n".join(source.splitlines()[node.lineno - 1 : node.end_lineno])  # with comments

    for node in ast.parse(source).body[1:]:
        text = text_of(node)
        if isinstance(node, ast.ImportFrom):
            name = f"from {node.module}"
        else:
            name = node.targets[0].id if isinstance(node, ast.Assign) else getattr(node, "name", text)
        if isinstance(node, ast.ClassDef):
            methods = [each for each in node.body if isinstance(each, ast.FunctionDef)]
            found |= {f"{name}.{method.name}": text_of(method) for method in methods}
            rest = [each for each in node.body if each not in methods]
            text = "\n".join(map(text_of, [*node.decorator_list, *node.bases, *rest]))
        found[name] = text
    return found


def only(one: dict, other: dict) -> set[str]:
    """Names of what the other lacks; of a class that it lacks, not each of its methods."""
    return {name for name in set(one) - set(other) if name.split(".")[0] in other or "." not in name}


def test_what_surrounds_the_algorithm_is_word_for_word_the_same():
    assert halves(tuned)[1] == halves(paper)[1]


def test_shared_definitions_are_word_for_word_the_same_and_in_the_same_order():
    one, other = definitions(tuned), definitions(paper)
    assert only(one, other) == ONLY_TUNED
    assert only(other, one) == ONLY_PAPER
    assert {name for name in set(one) & set(other) if one[name] != other[name]} == set(DIFFERENT.split())
    assert [name for name in one if name in other] == [name for name in other if name in one]


def main_diff() -> str:
    lines = [definitions(script)["main"].splitlines() for script in (tuned, paper)]
    diff = difflib.unified_diff(*lines, n=0, lineterm="")
    return "".join(f"{line}\n" for line in diff if line[:2] not in ("--", "++", "@@"))


def test_the_two_main_functions_differ_as_listed():
    """main.diff is the list of algorithmic differences in main; a fix goes into both scripts at once."""
    fix = "python tests/test_siblings.py > tests/main.diff"
    assert main_diff() == (TESTS / "main.diff").read_text(), f"if the change is meant: {fix}"


if __name__ == "__main__":
    print(main_diff(), end="")

"""Metrics of repetition against hand counts, repeats against suffix arrays, the lexer against Python's own."""

import ast
import io
import tokenize

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from riverrun.eval.repetition import metrics
from riverrun.eval.repetition.code_metrics import compiles, complete_lines, tr_n, tr_s
from riverrun.eval.repetition.code_set import RUN, code_prompts, read_prompts, repeats, template_prompt
from riverrun.eval.repetition.library import modules
from riverrun.eval.repetition.python_lines import PythonLines, lines_of, statements
from riverrun.eval.repetition.suffix_array import CommonPrefixes, lcp_array, suffix_array, tandem_repeats
from riverrun.eval.repetition.tandem import Run, suffix_matches, trailing_run, z_function

SEQUENCES = st.lists(st.integers(0, 2), max_size=24)


# Metrics


def test_constant_and_unique_texts():
    constant, unique = "a" * 100, list(range(100))
    assert [metrics.rep_n(constant, n) for n in (1, 4)] == [0.99, pytest.approx(1 - 1 / 97)]
    assert metrics.rep_sen("Here we go. " * 50) == pytest.approx(0.98)
    assert metrics.rep_w(constant) == 0.99 and metrics.rep_r(constant) == 1.0
    assert metrics.diversity(constant) == pytest.approx(1 / 99 / 98 / 97)
    assert [metrics.rep_n(unique, n) for n in (1, 2, 3, 4)] == [0.0] * 4
    assert metrics.rep_w(unique) == metrics.rep_r(unique) == 0.0 and metrics.diversity(unique) == 1.0
    assert metrics.rep_sen("One. Two! Three? Four") == 0.0


def test_counts_by_hand():
    text = "abcab"  # bigrams ab bc ca ab
    assert metrics.rep_n(text, 1) == pytest.approx(0.4) and metrics.rep_n(text, 2) == 0.25
    assert metrics.rep_r(text) == 0.8  # all but c are in the bigram ab
    assert metrics.rep_w(text, 3) == 0.4 and metrics.rep_w(text, 2) == 0.0
    assert metrics.diversity(text) == 0.75
    assert metrics.rep_sen("A b. C d.\n\nA  b.") == pytest.approx(1 / 3)


def test_too_short_to_say():
    assert [
        metrics.rep_n("abc", 4),
        metrics.rep_w(""),
        metrics.rep_r("a"),
        metrics.rep_sen(" "),
        metrics.diversity("abc"),
    ] == [None] * 5
    assert metrics.looking_back("a", "", 4) is None


def test_looking_back_by_hand():
    # after a, b, a: predicted b (not before: wrong), a (before, right), a (before, wrong; c is new)
    found = metrics.looking_back("abac", "baa", 16)
    assert found == pytest.approx((2 / 3, 1 / 3, 1 / 3))
    assert metrics.looking_back("abac", "baa", 1) == pytest.approx((1 / 3, 1 / 3, 0))
    with pytest.raises(ValueError, match="3 successors"):
        metrics.looking_back("abac", "b", 1)


# Repeats


@given(SEQUENCES)
def test_the_z_function_is_the_common_prefix(x):
    def common(i):
        return next((k for k in range(len(x) - i) if x[i + k] != x[k]), len(x) - i)

    assert z_function(x) == [common(i) for i in range(len(x))]
    for i, length in enumerate(suffix_matches(x)):
        assert x[i + 1 - length : i + 1] == x[len(x) - length :]
        assert i == len(x) - 1 or length == i + 1 or x[i - length] != x[len(x) - 1 - length]


@given(SEQUENCES)
def test_suffix_and_lcp_arrays_are_those_of_sorting(x):
    order = suffix_array(x)
    assert order == sorted(range(len(x)), key=lambda i: x[i:])
    lcp = lcp_array(x, order)
    for place in range(1, len(x)):
        a, b, n = x[order[place - 1] :], x[order[place] :], lcp[place]
        assert a[:n] == b[:n] and a[n : n + 1] != b[n : n + 1]


@settings(max_examples=200)
@given(SEQUENCES)
def test_repeats_at_the_end_are_those_of_suffix_arrays(x):
    copies = {
        (i, p)
        for i in range(len(x))
        for p in range(1, len(x))
        if x[i : i + p] == x[i + p : i + 2 * p] and i + 2 * p <= len(x)
    }
    assert tandem_repeats(x) == copies
    found = trailing_run(x)
    ending = {p for i, p in copies if i + 2 * p == len(x)}
    assert (found is None) == (not ending)
    if found is not None:
        common = CommonPrefixes(x[::-1])
        lengths = {p: p + common(0, p) for p in ending}
        assert found.length == max(lengths.values())
        assert found.period == min(p for p in ending if lengths[p] == found.length)


def test_runs_by_hand():
    assert trailing_run("xabcabcab") == Run(3, 8) and trailing_run("xabcabcab").count == 2
    assert trailing_run("aaaa") == Run(1, 4) and trailing_run("abc") is None and trailing_run("") is None


# The lexer


def shape(text):
    return [" ".join(line.symbols) for line in lines_of(text)]


@pytest.mark.parametrize(
    ("text", "shapes"),
    [
        ("assert f([1, 2, 3]) == -6\nassert g([7]) == 0x1F", ["assert NAME ( [ NUMBER ] ) == NUMBER"] * 2),
        ("x -1\nreturn -1e-5", ["NAME - NUMBER", "return NUMBER"]),
        ("a = [(1, 2), (3, 4),]\na = [(1, 'b')]", ["NAME = [ ( NUMBER ) ]", "NAME = [ ( NUMBER , STRING ) ]"]),
        ("a = '''x\ny''' 'z' # c\n# c\nb = ''", ["NAME = STRING", "COMMENT", "NAME = STRING"]),
        ("a = \\\n  rb'\\'' if b is None else ...", ["NAME = STRING if NAME is CONSTANT else CONSTANT"]),
        ("a = 'never closed\nb **= 1", ["NAME = STRING", "NAME **= NUMBER"]),
        ("def f(x,\n      y):\n    pass", ["def NAME ( NAME ,", "NAME ) :", "pass"]),
    ],
)
def test_shapes_of_lines(text, shapes):
    assert shape(text) == shapes


@given(
    st.lists(st.sampled_from(["a", "'", '"', "\\", "\n", "(", ")", ",", "#", " ", "1", "-", "."]), max_size=30),
    st.data(),
)
def test_pieces_make_no_difference_and_anything_is_lexed(parts, data):
    text, cut = "".join(parts), data.draw(st.integers(0, len(parts)))
    lexer = PythonLines()
    lexer.feed(text[:cut])
    lexer.unfinished()  # a look changes nothing
    lexer.feed(text[cut:])
    last = lexer.unfinished()
    assert lexer.lines + ([last] if last else []) == lines_of(text)
    for line in lines_of(text):
        assert text[line.begin : line.start].strip(" \n\\") == "" and not text[line.start].isspace()


def test_lines_and_statements_are_those_of_pythons_own_tokenizer():
    """Over modules of the standard library."""
    for (_name, text), _ in zip(modules(3), range(6)):
        if len(text) > 60000:
            continue
        starts, statement_ends = [], 0
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.NEWLINE:
                statement_ends += 1
            if token.type in (
                tokenize.INDENT,
                tokenize.DEDENT,
                tokenize.NL,
                tokenize.NEWLINE,
                tokenize.COMMENT,
                tokenize.ENDMARKER,
            ):
                continue
            starts.append(token.start)
        offsets, total = [0], 0
        for line in text.splitlines(keepends=True):
            offsets.append(total := total + len(line))
        real = {offsets[row - 1] + column for row, column in starts}
        lines = lines_of(text)
        code = [line for line in lines if line.symbols != ("COMMENT",)]
        assert {line.start for line in code} <= real
        assert len(statements(code)) == statement_ends


# Code


def test_structure_by_hand():
    text = "assert f(1) == 2\nassert g(3) == 4\nx = 1\nassert h(5) == 6\n"
    assert tr_s(text) == 0.5
    assert tr_s("x = 1\ny += 2\n") == 0.0 and tr_s("") is None
    assert tr_n("x = 1\n" * 2) == pytest.approx(0.2)  # x=1n =1nx 1nx= nx=1 x=1n
    assert tr_n("x = 1\n" * 50) > 0.97


def test_what_compiles():
    deep = "(" * 100000
    texts = [
        "x = 1\n",
        "x = \n",
        deep,
        "return 1\n",
        "raise SystemExit(3)\n",
        "x = 1\0",
        "y" * (2**20 + 1),
        "def f():\n    return 1\n",
    ]
    assert compiles(texts) == [True, False, False, False, True, False, False, True]
    assert compiles([]) == []
    assert complete_lines("a\nb", False) == "a\n" and complete_lines("a\nb", True) == "a\nb"


def test_the_set_is_the_same_for_a_seed_and_repeats():
    found = code_prompts(12, 7)
    assert found == code_prompts(14, 7)[:12] and found != code_prompts(12, 8)
    assert [prompt.source[:2] for prompt in found] == ["as", "rr"] * 6
    for prompt in found:
        assert 2 <= prompt.units <= 4 and prompt.text.endswith("\n")
        run = trailing_run([line.key for line in lines_of(prompt.text)])
        assert run is not None and run.count >= 2, prompt.text
        if prompt.source.startswith("rr"):
            whole = prompt.text + prompt.reference
            assert any(repeat.count >= RUN for repeat in repeats(lines_of(whole)))
    names = {template_prompt(7, number).source for number in range(5)}
    assert len(names) == 5
    for number in range(5):
        text = template_prompt(7, number).text
        ast.parse(text + "}\n" if "TABLE" in text else text)


def test_repeats_are_whole_statements():
    body = "".join(f"    self.{c} = {c}\n" for c in "abcdef")
    (found,) = repeats(lines_of("def f(self):\n" + body + "x = 1\n"))
    assert (found.first, found.period, found.count) == (1, 1, 6)
    assert repeats(lines_of("# c\n" * 9 + "import os\n" * 9)) == []
    pairs = "".join(f"if {c}:\n    f({c})\n" for c in "abcdef")
    (found,) = repeats(lines_of(pairs))
    assert (found.period, found.count) == (2, 6)


def test_prompts_from_a_file(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "x = 1\\n", "samples": []}\n\n{"prompt": "y"}\n')
    assert [prompt.text for prompt in read_prompts(path, 5)] == ["x = 1\n", "y"]
    path.write_text('{"text": 1}\n')
    with pytest.raises(ValueError, match="field `prompt`"):
        read_prompts(path, 5)
    with pytest.raises(ValueError, match="no file"):
        read_prompts(tmp_path / "none", 5)

"""Chains of models of recurrent depth: against the model, models that are built as the chain, and plain loops."""

from dataclasses import replace

import pytest
import torch
from eval_examples import read_json

from riverrun.eval import samples
from riverrun.eval.depth_search import iterations, report, search, task
from riverrun.eval.depth_search.answers import Likelihood
from riverrun.eval.depth_search.chains import Space, in_words, neighbours
from riverrun.eval.depth_search.recurrent import RecurrentUnits
from riverrun.eval.depth_search.task import Found, Iterated, Plan, Records, units_of
from riverrun.eval.models import LoadedModel
from riverrun.modeling.depth.universal_options import UniversalOptions
from riverrun.train.data.tokenizer import ByteTokenizer
from tests.eval.depth_search.test_task import GENERATED, invoke
from tests.modeling.depth.shapes import HUGINN, SHAPES, assert_close, build

CHOSEN = ("attention", "attention, window", "gated_delta, diagonal", "mamba2, para_lstm", "all core")
BYTES = {name: replace(SHAPES[name], vocab_size=ByteTokenizer.vocab_size) for name in CHOSEN}
BYTES["two of each, no norm"] = replace(
    BYTES["attention"], num_hidden_layers=6,
    depth=replace(HUGINN.depth, prelude_layers=2, coda_layers=2, norm_core=False),
)  # fmt: skip
IDS = torch.randint(0, 250, (3, 11), generator=torch.Generator().manual_seed(1))
CHAINS = [
    (0, 1, 1, 2),
    (0, 1, 1, 1, 1, 2, 2),
    (0, 0, 1, 1, 1, 2),
    (1, 1, 2),
    (0, 2),
    (0, 1),
    (0, 1, 0, 1, 1, 2),
    (2, 1),
]


def loaded(options, dtype=torch.float64) -> LoadedModel:
    return LoadedModel("looped", build(options, dtype), ByteTokenizer(), "a looped model", "0" * 64)


@pytest.fixture(params=BYTES)
def model(request) -> LoadedModel:
    return loaded(BYTES[request.param])


# what a chain computes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_any_number_of_iterations_is_the_models_bit_by_bit(model, dtype):
    network = model.model.to(dtype)
    units = RecurrentUnits(model)
    space = Space(units.identity, core=units.core)
    assert torch.equal(units.run(units.identity, IDS), network(IDS).logits)
    assert torch.equal(units.run(units.identity, IDS, keep=2), network(IDS, logits_to_keep=2).logits)
    for r in (1, 2, 7):
        assert torch.equal(units.run(space.with_iterations(r), IDS), network(IDS, num_steps=r).logits)
    assert space.iterations == network.model.depth.mean_recurrence


@torch.no_grad()
def test_a_chain_is_a_model_of_those_blocks():
    """Blocks left out and repeated before and after the loop."""
    model = loaded(BYTES["two of each, no norm"])
    units, before = RecurrentUnits(model), model.model.state_dict()
    for prelude, r, coda in [((0, 1), 3, (3, 4)), ((1,), 2, (3, 3, 4)), ((), 1, (4,)), ((0, 0, 1, 1, 0), 4, ())]:
        depth = replace(model.model.model.depth, prelude_layers=len(prelude), coda_layers=len(coda))
        layers = len(prelude) + 2 + len(coda)
        oracle = build(replace(BYTES["two of each, no norm"], num_hidden_layers=layers, depth=depth))
        weights = {name: value for name, value in before.items() if ".prelude." not in name and ".coda." not in name}
        for part, blocks in (("prelude", prelude), ("coda", [unit - 3 for unit in coda])):
            for place, block in enumerate(blocks):
                start = f"model.{part}.{block}."
                own = {name.removeprefix(start): value for name, value in before.items() if name.startswith(start)}
                weights |= {f"model.{part}.{place}.{name}": value for name, value in own.items()}
        oracle.load_state_dict(weights)
        assert_close(units.run((*prelude, *r * [2], *coda), IDS), oracle(IDS, num_steps=r).logits)


@torch.no_grad()
def test_a_chain_that_returns_to_the_core_has_another_loop(model):
    """By the model's own pieces: each loop starts from s_0, over what came before it."""
    network, units = model.model, RecurrentUnits(model)
    body, start = network.model, RecurrentUnits(model).start(IDS)
    s_0, layout = start.arguments

    def loop(x, r):
        s = s_0
        for _ in range(r):
            s = body.core.iterate(s, x, layout)
        left = body.core.injection.read_out(s)
        return body.norm(left) if body.depth.norm_core else left

    x = body.embed(IDS)
    x = loop(body.run(body.prelude, x, layout), 2)
    x = loop(body.run(body.prelude, x, layout), 1)
    chain = (*range(units.core), units.core, units.core, *range(units.core), units.core)
    if body.prelude:  # without blocks between them they are one loop
        assert_close(units.run(chain, IDS), network.lm_head(body.norm(x)))
    else:
        assert_close(units.run(chain, IDS), network(IDS, num_steps=3).logits)


def test_tokens_have_states_of_each_place(model):
    """Cached tokens, one after another, are those of reading everything again."""
    units, prompt = RecurrentUnits(model), IDS[0].tolist()
    core, end = units.core, max(units.identity)
    for chain in (units.identity, (*range(core), *5 * [core], *range(core + 1, end + 1)), (core, 0, core, core, end)):
        ids, expected = IDS[:1], []
        for _ in range(6):
            expected.append(int(units.run(chain, ids, 1).argmax()))
            ids = torch.cat([ids, torch.tensor([[expected[-1]]])], 1)
        assert [token for _, token in zip(range(6), units.next_tokens(chain, prompt))] == expected


def test_shared_prefixes_change_nothing_but_the_cost(model):
    answer = Likelihood(model, RecurrentUnits(model), GENERATED[2])
    chains = CHAINS if len(set(answer.units.identity)) > 1 else [(0,), (0, 0), (0, 0, 0)]
    together = answer.scores(chains)
    alone = [Likelihood(model, answer.units, GENERATED[2], cache_bytes=0).scores([chain])[0] for chain in chains]
    assert_close(together, torch.stack(alone))
    prefixes = {chain[:n] for chain in chains for n in range(1, len(chain) + 1)}
    assert answer.passes == len(prefixes) < sum(map(len, chains))
    assert len({tuple(row) for row in together.tolist()}) == len(chains)  # they do differ


def test_universal_transformers_are_refused():
    options = replace(
        HUGINN, depth=None, sandwich_norm=False, num_hidden_layers=1, universal=UniversalOptions(max_steps=3)
    )
    with pytest.raises(ValueError, match=r"fixed depth, or of recurrent depth \(model.depth\)"):
        units_of(loaded(replace(options, vocab_size=ByteTokenizer.vocab_size)))


# chains, without a model

SPACE = Space((0, 1, 2, 2, 2, 2, 3), k=2, r=1, core=2)


def test_iterations_are_one_unit_that_runs_again():
    assert (SPACE.num_units, SPACE.iterations, SPACE.longest) == (4, 4, 14)
    assert SPACE.with_iterations(2) == (0, 1, 2, 2, 3) and SPACE.with_iterations(4) == SPACE.identity
    shorter, longer = neighbours(SPACE, SPACE.identity)
    assert set(shorter) == {
        (1, 2, 2, 2, 2, 3), (0, 2, 2, 2, 2, 3), (0, 1, 2, 2, 2, 3), (0, 1, 2, 2, 2, 2),
        (2, 2, 2, 2, 3), (0, 2, 2, 2, 3), (0, 1, 2, 2, 3), (0, 1, 2, 2, 2),
    }  # fmt: skip  # whichever of the iterations is left out
    assert (0, 1, 2, 2, 2, 2, 2, 3) in longer and (0, 1, 2, 1, 2, 2, 2, 2, 3) in longer
    assert len(longer) == len(set(longer)) == 4 + 4  # single units, and pairs


def test_chains_in_words():
    assert in_words((0, 1, 2, 2, 2, 2, 3, 4, 4)) == "0-1 2×4 3-4 4" and in_words((2, 2, 2)) == "2×3"


def test_length_is_counted_against_the_identitys():
    tree = search._Tree(SPACE, search.TreeOptions(exploration=0, length_penalty=14), task.Random(0))
    tree.root.visits = 1
    assert tree._bound(search.Node((0, 1, 2), visits=1)) == -6


# the task


def ignoring_its_state(options) -> LoadedModel:
    """Its injection passes e alone on, so that the core has settled after one iteration."""
    found = loaded(options)
    with torch.no_grad():
        found.model.model.core.injection.weight[:, : options.hidden_size] = 0
    return found


def test_a_settled_core_makes_iterations_no_ops(tmp_path):
    plan = Plan(simulations=4, k=3, r=1)
    for make, changes in ((ignoring_its_state, False), (loaded, True)):
        model = make(replace(BYTES["attention"], initializer_range=0.5))
        records, _, space = task.run(model, plan, GENERATED, "test", tmp_path / make.__name__)
        assert [each.number for each in records.iterated] == list(range(9))
        r = space.iterations
        assert {tuple(each.iterations) for each in records.iterated} == {tuple(range(max(1, r - 3), r + 4))}
        shares = iterations.by_number(records.iterated, space)
        base = sum(each.base for each in records.found if each.part == "search") / 9
        assert shares[r] == {"right": base, "changed": 0}
        assert any(share["changed"] for share in shares.values()) == changes
        for each in records.iterated:
            answer = Likelihood(model, RecurrentUnits(model), GENERATED[each.number])
            assert each.right == [answer.alone(space.with_iterations(count)) for count in each.iterations]


def test_figures_by_hand():
    def found(part, bases, chains):
        return [
            Found(part, "sums", n, b, bool(chain), list(chain), 10, 3, 100)
            for n, (b, chain) in enumerate(zip(bases, chains))
        ]

    base, counts = [True, False, False, True], [3, 4, 5]
    searched = found("search", base, [(0, 2, 3), (0, 1, 2, 2, 2, 2, 2, 3), (), (0, 1, 2, 2, 2, 2, 3)])
    after = [[True, True, False], [False, False, True], [False, False, False], [True, True, True]]
    iterated = [Iterated("iterations", "sums", number, counts, right, 20) for number, right in enumerate(after)]
    records = Records(searched + found("random", base, 4 * [()]), [], iterated)
    (result,) = report.summarize(records, {}, SPACE, 4)
    details = result.details["iterations"]
    assert details["as_it_is"] == 4 and details["histogram"]["search"] == {1: 1, 4: 1, 5: 1}
    assert details["histogram"]["random"] == {} and "iterations" not in details["histogram"]
    assert details["by_number"] == {
        3: {"right": 0.5, "changed": 0}, 4: {"right": 0.5, "changed": 0}, 5: {"right": 0.5, "changed": 0.5}
    }  # fmt: skip
    expected = {
        "accuracy_iterations": 3 / 4,
        "shorter_iterations": 1,
        "saved_iterations": 1 / 7,
        "corrected_iterations": 1 / 2,
        "changed_iterations": 2 / 8,
    }
    assert {name: result.metrics[name] for name in expected} == pytest.approx(expected)
    assert result.metrics["saved_search"] == pytest.approx(4 / 7)
    assert result.details["costs"]["iterations"] == {"evaluations": 12, "passes": 80}
    assert result.details["usage"]["search"] == pytest.approx([1, 2 / 3, 10 / 3, 1])
    assert result.details["identity"] == list(SPACE.identity) and result.details["num_layers"] == 4


def test_the_command(tmp_path):
    from matplotlib import image

    model = build(BYTES["attention"], torch.float32)
    model.save_pretrained(tmp_path / "model")
    ByteTokenizer().save(tmp_path / "model")
    args = ["--model", tmp_path / "model", "--generate", 6, "--simulations", 10, "--num-steps", 3]
    result = invoke(*args, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    for text in (
        "with num_steps=3",
        "3 iterations of the core (unit 1)",
        "iterations of the core, 3 in the model as it is",
    ):
        assert text in result.stdout
    document = read_json(tmp_path / "out" / "results.json")
    details = document["details"]["cola"]
    assert details["identity"] == [0, 1, 1, 1, 2] and document["config"]["num_steps"] == 3
    assert sorted(map(int, details["iterations"]["by_number"])) == list(range(1, 8))
    assert document["results"]["cola"]["accuracy_iterations,none"] >= document["results"]["cola"]["accuracy_base,none"]
    for name in ("cola.png", "layers.png", "iterations.png"):
        assert image.imread(tmp_path / "out" / name).shape[1] > 500
    lines = (tmp_path / "out" / samples.SAMPLES).read_text()
    assert len(lines.splitlines()) == 3 * 6 + 3 * 2
    other = invoke(*args[:-1], 4, "--out", tmp_path / "out")
    assert isinstance(other.exception, ValueError) and "(model_fingerprint differ)" in str(other.exception)
    assert invoke(*args, "--out", tmp_path / "out").exit_code == 0
    assert (tmp_path / "out" / samples.SAMPLES).read_text() == lines

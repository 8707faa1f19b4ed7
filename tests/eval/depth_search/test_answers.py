"""Right or wrong: likelihoods against the plain model's, shared prefixes, generation."""

import pytest
import torch
from eval_examples import exact_hybrid, hybrid
from planted import QUESTION, Digit, Planted, loaded
from transformers import LlamaConfig, LlamaForCausalLM

from riverrun.eval.depth_search.answers import Generation, Likelihood
from riverrun.eval.depth_search.models import Layers
from riverrun.eval.depth_search.questions import Question, make_question
from riverrun.train.data.tokenizer import ByteTokenizer

CHAINS = [(0, 1, 2, 3, 4), (0, 1, 3, 4), (0, 1, 1, 2, 3, 4), (2,), (0, 1, 3, 4, 4), (4, 2), (0, 1, 1, 2)]
LONG = Question("Where is it?", ("in Adam's house", "x", "né à bay"), ("1", "2", "3"), 2)


def exact_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258, hidden_size=16, intermediate_size=24, num_hidden_layers=5, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


@pytest.fixture(params=[exact_hybrid, exact_llama])
def model(request):
    return loaded(request.param())


def asked(model, question=LONG, **options):
    return Likelihood(model, Layers(model), question, **options)


def test_scores_are_log_likelihoods_per_character(model):
    """Of each choice on its own, without padding; other models begin with their token for that."""
    found = asked(model).scores([(0, 1, 2, 3, 4)])[0]
    begin = [] if model.is_riverrun else [ByteTokenizer.bos_id]
    prompt = begin + list(LONG.prompt.encode())
    for score, choice in zip(found.tolist(), LONG.choices):
        tokens = list(f" {choice}".encode())
        with torch.no_grad():
            logits = model.model(torch.tensor([prompt + tokens]), use_cache=False).logits[0].double()
        chosen = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, torch.tensor(tokens)[:, None])
        assert score == pytest.approx(chosen.sum().item() / len(choice), rel=1e-6)


def test_shared_prefixes_change_nothing_but_the_cost(model):
    plain = asked(model, cache_bytes=0)
    expected = torch.cat([plain.scores([chain]) for chain in CHAINS])
    assert plain.passes == sum(map(len, CHAINS)) and not plain.kept
    kept = asked(model)
    one_by_one = torch.cat([kept.scores([chain]) for chain in CHAINS])
    assert torch.equal(one_by_one, expected)  # the same batches: bit by bit
    prefixes = {chain[:n] for chain in CHAINS for n in range(1, len(chain) + 1)}
    assert kept.passes == len(prefixes) < plain.passes
    assert torch.equal(kept.scores(CHAINS[:1]), expected[:1]) and kept.passes == len(prefixes)  # nothing is left to run
    together = asked(model, cache_bytes=0)
    torch.testing.assert_close(together.scores(CHAINS), expected, rtol=1e-6, atol=1e-6)
    assert together.passes == len(prefixes)
    assert kept.right(CHAINS) == together.right(CHAINS) == [kept.alone(chain) for chain in CHAINS]


def test_the_cache_holds_what_it_may(model):
    one = asked(model)
    one.scores([(0,)])
    size = one.kept[(0,)].nbytes
    few = asked(model, cache_bytes=3 * size)
    expected = asked(model).scores(CHAINS)
    for chain, wanted in zip(CHAINS * 2, [*expected, *expected]):
        torch.testing.assert_close(few.scores([chain])[0], wanted, rtol=1e-6, atol=1e-6)
        assert len(few.kept) <= 3 and few.kept_bytes == sum(hidden.nbytes for hidden in few.kept.values())
    assert one.passes == 1 and few.passes > len({chain[:n] for chain in CHAINS for n in range(1, 7)})


def test_different_chains_run_together():
    """Those whose next layer is the same are one batch of it, whatever they were before."""
    rows = []

    class Counting(Digit):
        def forward(self, hidden):
            rows.append((self.number, len(hidden) // len(QUESTION.choices)))
            return super().forward(hidden)

    network = Planted(4, lambda chain: len(chain) == 2)
    network.layers = torch.nn.ModuleList(Counting(i, network.base) for i in range(4))
    answer = asked(loaded(network), QUESTION)
    rows.clear()
    assert answer.right([(0, 3), (1, 3), (2, 3), (0, 3, 3), (1,)]) == [True, True, True, False, False]
    assert sorted(rows) == [(0, 1), (1, 1), (2, 1), (3, 1), (3, 3)]
    assert answer.passes == 7
    answer = asked(loaded(network), QUESTION)
    rows.clear()
    answer.right([(0, 1, 2, 3), (0, 3), (1, 3), (1, 2, 3)])  # each layer once, for all
    assert rows == [(0, 1), (1, 2), (2, 2), (3, 4)]


def test_a_tie_and_what_is_not_a_number_are_wrong():
    answer = asked(loaded(Planted(2, lambda chain: True)), QUESTION)
    for scores in ([1.0, 1.0], [float("nan"), 0.0], [0.0, float("nan")], [0.0, 1.0]):
        assert not answer._is_right(torch.tensor(scores))
    assert answer._is_right(torch.tensor([1.0, 0.9]))


def test_tokens_that_join_the_prompt_and_a_choice():
    """The prompt's last token is scored where a choice changes it."""

    class Joining(ByteTokenizer):
        def encode(self, text):
            return super().encode(text.replace(": y", "@"))

    model = loaded(hybrid())
    model = type(model)(model.name, model.model, Joining(), model.description, model.fingerprint)
    answer = asked(model, QUESTION)
    prompt = len(QUESTION.prompt) - 1  # without the colon
    assert answer.ids.shape[1] == prompt + 4 and answer.targets[0].tolist() == [*b"@es", -100, -100]
    assert answer.targets[1].tolist() == list(b": not")


# generation


def test_generated_answers():
    spoken = []

    class Speaking:
        def next_tokens(self, chain, prompt):
            yield from spoken

    model = loaded(hybrid())
    answer = Generation(model, Speaking(), make_question(0, 0), new_tokens=6)
    said = answer.question.choices[answer.question.answer]
    for text, chain, right, passes in (
        (f" {said}\nmore", (0, 1), True, 2 * (len(said) + 2)),
        ("\n" + said + "\n", (1,), True, len(said) + 2),
        ("1234567890", (0, 0, 0), False, 18),
    ):
        spoken[:], answer.passes = text.encode(), 0
        assert answer.right([chain]) == [right] and answer.passes == passes
    spoken[:] = [*said.encode(), ByteTokenizer.eos_id]
    assert answer.alone((0,)) and answer.text((0,)) == said


def test_generation_runs_the_chain():
    model = loaded(hybrid())
    layers, question = Layers(model), make_question(0, 1)
    answer = Generation(model, layers, question, new_tokens=5)
    prompt = list(question.listing.encode())
    texts = set()
    for chain in [(0, 1, 2, 3, 4), (0, 1, 1, 3, 4), (4, 4)]:
        ids = torch.tensor([prompt])
        for _ in range(5):
            ids = torch.cat([ids, layers.run(chain, ids)[:, -1:].argmax(-1)], 1)
        made = ids[0, len(prompt) :].tolist()
        assert not {10, ByteTokenizer.eos_id} & set(made)
        assert answer.text(chain) == ByteTokenizer().decode(made)
        texts.add(answer.text(chain))
    assert len(texts) == 3 and answer.passes == 2 * 5 * (5 + 5 + 2)

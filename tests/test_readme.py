"""The README's code runs, and does what the text beside it says."""

import re
from pathlib import Path

import torch

from riverrun.modeling.layout import Layout
from riverrun.modeling.mixers import MIXERS

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_example_mixer_decodes_and_resets():
    (code,) = re.findall(r"```python\n(# modeling/mixers/ema\.py.*?)```", README, re.DOTALL)
    namespace: dict = {"__name__": "ema"}
    exec(code, namespace)
    mixer = MIXERS.pop("ema")(namespace["EMAOptions"](), 8, 1e-5)
    mixer.reset_parameters()
    assert set(mixer.parameter_plan()) == {name for name, _ in mixer.named_parameters()}

    x = torch.randn(2, 6, 8)
    full = mixer(x, Layout.of_rows((2, 6), torch.zeros(2, dtype=torch.long)))
    states: dict[str, torch.Tensor] = {}
    parts = [mixer(x[:, :4], Layout.of_rows((2, 4), torch.zeros(2, dtype=torch.long)), states)]
    parts += [mixer(x[:, t : t + 1], Layout.of_rows((2, 1), torch.full((2,), t)), states) for t in (4, 5)]
    torch.testing.assert_close(torch.cat(parts, dim=1), full)

    packed = mixer(x[:1], Layout.of_documents((1, 6), torch.tensor([0, 2, 6], dtype=torch.int32)))
    alone = mixer(x[:1, 2:], Layout.of_rows((1, 4), torch.zeros(1, dtype=torch.long)))
    torch.testing.assert_close(packed[:, 2:], alone)


def test_every_path_that_the_readme_names_exists():
    root = Path(__file__).parent.parent
    for path in re.findall(r"`((?:kernels|modeling|train|launch|eval|tests|slurm)/[\w/.-]*)`", README):
        assert (root / path).exists(), path

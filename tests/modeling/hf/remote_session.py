"""Run as a script: uses an exported folder as a stranger would, with torch and transformers only.

Arguments: the folder, where to save the results, "blocked" or the path from which riverrun is imported first.
"""

import sys
from pathlib import Path

folder, results, riverrun = sys.argv[1:]

if riverrun == "blocked":

    class Blocker:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "riverrun":
                raise ImportError("riverrun is not installed here")

    sys.meta_path.insert(0, Blocker())
else:
    sys.path.insert(0, riverrun)
    import riverrun.modeling.model

import torch  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # noqa: E402

torch.set_num_threads(1)
tokenizer = AutoTokenizer.from_pretrained(folder)
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
assert isinstance(model.config, type(config))
if riverrun == "blocked":
    assert not any(name.split(".")[0] == "riverrun" for name in sys.modules)

out = {}
with torch.no_grad():
    ids = torch.arange(3, 53).view(2, 25)
    out["logits"] = model(ids).logits
    texts = ["w5 w9 w12 w40 w33 w8 w7", "w6 w7", "w60 w61 w3 w4"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    assert (batch["attention_mask"][:, 0] == 0).sum() == 2, "two of the prompts are padded on the left"
    greedy = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    batch.pop("token_type_ids", None)
    together = model.generate(**batch, **greedy)[:, -8:]
    for text, row in zip(texts, together):
        alone = tokenizer(text, return_tensors="pt")
        alone.pop("token_type_ids", None)
        assert torch.equal(model.generate(**alone, **greedy)[0, -8:], row), text
    out["greedy"] = together
    torch.manual_seed(0)
    sampled = model.generate(**batch, max_new_tokens=8, do_sample=True, top_k=20, temperature=1.5, eos_token_id=None)
    assert sampled.shape[1] == batch["input_ids"].shape[1] + 8
    out["beam"] = model.generate(**batch, num_beams=3, **greedy)[:, -8:]
    out["beam_no_cache"] = model.generate(**batch, num_beams=3, use_cache=False, **greedy)[:, -8:]
    out["eos"] = model.generation_config.eos_token_id

    saved = Path(results).parent / "saved_again"
    model.save_pretrained(saved)
    again = AutoModelForCausalLM.from_pretrained(saved, trust_remote_code=True).eval()
    out["again"] = again(ids).logits
    out["files"] = sorted(path.name for path in saved.glob("*.py"))
torch.save(out, results)

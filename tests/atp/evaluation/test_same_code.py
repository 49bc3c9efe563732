"""One code for every form of a model: masked on the sums and cut, a model gets the same scores item by item."""

import pytest
import torch
from tiny_scored import LABELS, tiny_model

from atp.data.tasks import ROUGE, Task
from atp.evaluation import evaluate_model, sliding_windows
from atp.lora.controller import MaskController
from atp.lora.layer import add_lora
from atp.removal import cut_model, merge_adapter
from atp.spaces.space import MaskSpace


@pytest.mark.parametrize("space_name", ["head_dim", "kv_group", "disp"])
def test_masked_cut_and_merged_models_score_alike(tokenizer, examples, space_name):
    pytest.importorskip("rouge_score")
    base = tiny_model(seed=5)
    space = MaskSpace.from_config(base.config, space_name)
    model = add_lora(base, space, r=2, alpha=4.0, dropout=0.0).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.2, generator=generator)
    mask = torch.rand(space.size, generator=generator) < 0.6
    for structure in space.structures:
        mask[structure.start] = True
    tasks = [Task("qa", LABELS), Task("free", metrics=ROUGE, max_new_tokens=5)]
    asked = [*examples, *(type(e)(e.document, e.prompt, " the cat sat", None, "free") for e in examples[:4])]
    windows = sliding_windows(asked, tokenizer, 12)

    def scores(form):
        return evaluate_model(form, tokenizer, windows, asked, tasks=tasks, batch_size=4)

    dense = scores(model)
    with MaskController(model, space).masks(mask, "sum"):
        masked = scores(model)
    cut = cut_model(model, space, mask)
    for other in (scores(cut), scores(merge_adapter(cut))):
        assert other["tasks"]["qa"]["items"] == masked["tasks"]["qa"]["items"]
        assert other["tasks"]["free"]["items"] == masked["tasks"]["free"]["items"]
        assert other["perplexity"] == pytest.approx(masked["perplexity"], rel=1e-4)
        assert other["perplexity_interval"] == pytest.approx(masked["perplexity_interval"], rel=1e-4)
    assert dense["perplexity"] != pytest.approx(masked["perplexity"], rel=1e-2), "the mask must matter in this test"

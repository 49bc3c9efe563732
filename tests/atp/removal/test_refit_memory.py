"""What the refit holds at once of all batches: states of both models, their difference, and one linear's inputs."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from atp.lora.controller import MaskController
from atp.lora.layer import add_lora
from atp.removal.refit import in_place, refit
from atp.spaces.space import MaskSpace
from atp.training import offload

HIDDEN, INNER, BATCHES, LENGTH = 32, 96, 40, 128


class Held(TorchDispatchMode):
    """The bytes of tensors made under it: those that live now, and the most that ever did."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.users = {}  # of each storage, how many tensors

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self._take(tensor)
        return result

    def _take(self, tensor):
        storage = tensor.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        if not size:
            return
        self.now += size if key not in self.users else 0
        self.users[key] = self.users.get(key, 0) + 1
        self.most = max(self.most, self.now)
        weakref.finalize(tensor, self._drop, key, size)

    def _drop(self, key, size):
        self.users[key] -= 1
        if not self.users[key]:
            del self.users[key]
            self.now -= size


def refitted(padded, aside=in_place):
    """A refit of `BATCHES` windows: what it changed, and the most bytes of tensors in it."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    space = MaskSpace.from_config(config, "kv_group")
    model = add_lora(model, space, r=2, alpha=4, dropout=0.0).eval()
    mask = torch.rand(space.size) < 0.7
    batches = [{"input_ids": torch.randint(0, 64, (1, LENGTH))} for _ in range(BATCHES)]
    if padded:
        for batch in batches:
            batch["text"] = torch.arange(LENGTH)[None] < LENGTH - 1
    decoder = model.get_base_model().model
    with Held() as held:
        changed = refit(decoder, MaskController(model, space), space, mask, batches, aside=aside)
    return changed, held.most


@pytest.mark.parametrize("padded", [False, True])
def test_inputs_and_states_are_held_once(padded):
    changed, most = refitted(padded)
    assert changed
    states, inputs = (4 * BATCHES * LENGTH * width for width in (HIDDEN, INNER))
    # The rest is of each batch alone, as its RoPE.
    assert 3 * states + inputs < most < 1.25 * (3 * states + inputs)


@pytest.mark.parametrize("padded", [False, True])
def test_states_put_aside_change_nothing_and_leave_one_window(padded, tmp_path, monkeypatch):
    monkeypatch.setattr(offload, "SMALLEST", 0)
    kept, most = refitted(padded)
    aside, less = refitted(padded, offload.Offload(tmp_path).aside)
    assert kept.keys() == aside.keys() and all(torch.equal(kept[name], aside[name]) for name in kept)
    assert less < 0.35 * most, "RoPE of each window and the solver are what is left"
    assert not list(tmp_path.iterdir()), "the file has no name"


def test_a_place_in_the_file_is_used_again(tmp_path, monkeypatch):
    monkeypatch.setattr(offload, "SMALLEST", 0)
    elsewhere = offload.Offload(tmp_path)
    tensors = [torch.full((5, 7), float(number), dtype=torch.bfloat16).T for number in range(3)]
    backs = [elsewhere.aside(tensor) for tensor in tensors]
    backs[1] = elsewhere.aside(torch.full((7, 5), 9.0))  # another size has a place of its own
    backs[0] = elsewhere.aside(tensors[2])
    backs.append(elsewhere.aside(tensors[0]))
    found = [back() for back in backs]
    assert elsewhere._slots.end == 3 * 70 + 140, "the place of the second, then that of the first"
    for got, expected in zip(found, [tensors[2], torch.full((7, 5), 9.0), tensors[2], tensors[0]], strict=True):
        assert torch.equal(got, expected)

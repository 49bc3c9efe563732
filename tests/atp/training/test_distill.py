"""Self-distillation: the mixed loss against its definition, and a teacher that stays what it was."""

import pytest
import torch
from tiny_run import make, trained_tensors, windows
from torch.nn import functional as F

from atp.data import collate
from atp.training import cross_entropy
from atp.training.cross_entropy import SoftTargets, linear_cross_entropy
from atp.training.distill import Teacher
from atp.training.loss import causal_lm_loss

TOKENS, HIDDEN, THEIRS, VOCAB = 23, 12, 7, 41


def case(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    targets = torch.randint(VOCAB, (TOKENS,), generator=generator)
    return normal(TOKENS, HIDDEN), normal(VOCAB, HIDDEN), targets, normal(TOKENS, THEIRS), normal(VOCAB, THEIRS)


def by_definition(hidden, weight, targets, their_hidden, their_head, share, cap=None):
    logits, theirs = hidden @ weight.T, their_hidden @ their_head.T
    if cap is not None:
        logits, theirs = cap * torch.tanh(logits / cap), cap * torch.tanh(theirs / cap)
    log_p, log_q = logits.log_softmax(-1), theirs.log_softmax(-1)
    divergence = F.kl_div(log_p, log_q, reduction="sum", log_target=True)
    return (1 - share) * F.nll_loss(log_p, targets, reduction="sum") + share * divergence


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("rows", [1, 5, 64])
def test_the_mixed_loss_equals_its_definition(monkeypatch, share, rows, cap):
    monkeypatch.setattr(cross_entropy, "_rows", lambda hidden, *_: min(rows, len(hidden)))
    hidden, weight, targets, theirs, head = case()
    results = []
    for loss_of in (
        lambda h, w: linear_cross_entropy(h, w, targets, SoftTargets(theirs, head, share), cap=cap),
        lambda h, w: by_definition(h, w, targets, theirs, head, share, cap),
    ):
        inputs = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = loss_of(*inputs)
        results.append((loss, *torch.autograd.grad(0.7 * loss, inputs)))
    for ours, truth in zip(*results, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)


def test_bfloat16_stays_near_float64():
    hidden, weight, targets, theirs, head = case(torch.bfloat16)
    loss = linear_cross_entropy(hidden, weight, targets, SoftTargets(theirs, head, 0.5))
    exact = by_definition(*(t.double() if t.is_floating_point() else t for t in (hidden, weight, targets)),
                          theirs.double(), head.double(), 0.5)  # fmt: skip
    assert loss.dtype == torch.float32 and abs(float(loss) - float(exact)) < 0.01 * float(exact)


def test_a_student_that_is_its_teacher_has_no_distance(tmp_path):
    """And its gradient is the cross-entropy's share alone."""
    trainer = make(tmp_path)
    batch = collate([windows(4, 7)[row] for row in range(4)])
    teacher = Teacher(trainer.model, 1.0, None)
    loss = causal_lm_loss(trainer.model, batch, teacher=teacher)
    loss.backward()
    assert abs(float(loss)) < 1e-5
    assert max(float(p.grad.abs().max()) for p in trainer.model.parameters() if p.grad is not None) < 1e-5


def test_the_teacher_is_a_copy(tmp_path):
    """Training, refit and cut of the student change nothing in what it predicts."""
    trainer = make(tmp_path, training={"open": 3, "distill": 0.5})
    batch = collate([windows(4, 7)[row] for row in range(4)])
    seen = {}

    class Look:
        def __getattr__(self, name):
            return lambda *_: None

        def on_phase(self, loop):
            seen[loop.phase] = None if loop.teacher is None else loop.teacher.targets(batch).hidden

    trainer.callbacks.append(Look())
    trainer.train()
    assert list(seen) == ["open", "search", "settle", "tune"] and seen["open"] is None
    assert torch.equal(seen["search"], seen["settle"]) and torch.equal(seen["search"], seen["tune"])
    taught = dict(trainer._taught)
    student = trained_tensors(trainer)
    assert taught.keys() == student.keys() and any(taught[n].shape != student[n].shape for n in taught)


def test_linears_are_copied_in_the_dtype_of_the_passes(tmp_path):
    trainer = make(tmp_path)
    teacher = Teacher(trainer.model, 0.5, torch.bfloat16)
    dtypes = {name: p.dtype for name, p in teacher.model.named_parameters()}
    assert dtypes["model.layers.0.mlp.down_proj.weight"] == torch.bfloat16
    assert dtypes["model.embed_tokens.weight"] == dtypes["model.norm.weight"] == torch.float32
    base = trainer.model.get_base_model()
    assert base.get_input_embeddings().weight.data_ptr() == teacher.model.get_input_embeddings().weight.data_ptr()
    assert base.model.layers[0].mlp.down_proj.base_layer.weight.dtype == torch.float32

"""Guards the divergence of two whole distributions: by hand on five tokens, cut or not, and no gradient to the teacher."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from core_torl.config.coach_checks import CHOICES
from core_torl.objective.distillation import divergence

DIRECTIONS = CHOICES["direction"]

T, H, V = 7, 4, 5


def make(seed: int = 0):
    """Hidden states of a student and a teacher, ids, weights, and a head for each."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    student, teacher = normal(T, H).requires_grad_(), normal(T, H)
    ids = torch.randint(0, V, (T,), generator=generator)
    weights = torch.rand(T, generator=generator) + 0.1
    heads = []
    for _ in range(2):
        head = torch.nn.Linear(H, V, bias=False)
        head.weight.data = normal(V, H)
        heads.append(head)
    return student, teacher, ids, weights, *heads


def by_hand(p: list[float], q: list[float], direction: str) -> float:
    """p the teacher's, q the student's probabilities of one token."""

    def kl(a, b):
        return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))

    if direction == "forward":
        return kl(p, q)
    if direction == "reverse":
        return kl(q, p)
    middle = [(x + y) / 2 for x, y in zip(p, q, strict=True)]
    return 0.5 * kl(p, middle) + 0.5 * kl(q, middle)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_by_hand_on_five_tokens(direction, temperature):
    student, teacher, ids, weights, own, other = make()
    found = divergence(student, teacher, ids, weights, own, other, direction=direction, temperature=temperature)
    values, gaps = [], []
    for t in range(T):
        p = (other(teacher[t]) / temperature).double().softmax(-1).tolist()
        q = (own(student[t]) / temperature).double().softmax(-1).tolist()
        values.append(by_hand(p, q, direction))
        gaps.append(math.log(p[ids[t]] / q[ids[t]]))
    assert found.per_token.tolist() == pytest.approx(values, rel=1e-5)
    assert found.gap.tolist() == pytest.approx(gaps, rel=1e-5, abs=1e-6)
    expected = sum(w * v for w, v in zip(weights.tolist(), values, strict=True))
    assert found.total.item() == pytest.approx(expected, rel=1e-5)
    assert not found.per_token.requires_grad and not found.gap.requires_grad and found.total.requires_grad


def test_the_directions_differ():
    student, teacher, ids, weights, own, other = make()
    totals = [divergence(student, teacher, ids, weights, own, other, direction=d).total.item() for d in DIRECTIONS]
    assert len({round(x, 3) for x in totals}) == 3


def gradients(student, teacher, ids, weights, own, other, **settings):
    student = student.detach().clone().requires_grad_()
    teacher = teacher.detach().clone().requires_grad_()
    own.zero_grad(), other.zero_grad()
    found = divergence(student, teacher, ids, weights, own, other, **settings)
    found.total.backward()
    return found, student.grad, own.weight.grad.clone(), teacher.grad, other.weight.grad


@pytest.mark.parametrize("step", [1, 2, 3, T])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_slices_change_neither_value_nor_gradient(direction, step):
    parts = make(1)
    whole, states, head, *_ = gradients(*parts, direction=direction)
    cut, cut_states, cut_head, *_ = gradients(*parts, direction=direction, slice_elements=step * V + 1)
    assert torch.allclose(whole.total, cut.total) and torch.allclose(whole.per_token, cut.per_token)
    assert torch.allclose(whole.gap, cut.gap) and states.abs().max() > 1e-2 < head.abs().max()
    assert torch.allclose(states, cut_states, atol=1e-6) and torch.allclose(head, cut_head, atol=1e-6)


@pytest.mark.parametrize("slice_elements", [V, 10**6])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_teacher_gets_no_gradient(direction, slice_elements):
    *_, teacher, head = gradients(*make(2), direction=direction, slice_elements=slice_elements)
    assert teacher is None and head is None


@pytest.mark.parametrize("slice_elements", [V, 10**6])
def test_nor_does_it_when_teacher_and_student_are_one_model(slice_elements):
    """A frozen copy as the teacher gives the same gradient; one that is not frozen would not."""
    student, teacher, ids, weights, own, _ = make(3)
    body = torch.nn.Linear(H, H)
    frozen = [copy.deepcopy(m).requires_grad_(False) for m in (body, own)]
    found = []
    for states_of, head in ((body, own), frozen):
        body.zero_grad(), own.zero_grad()
        states = body(student.detach())
        total = divergence(
            states, states_of(teacher), ids, weights, own, head, slice_elements=slice_elements, temperature=0.8
        ).total
        total.backward()
        found.append([p.grad.clone() for p in (*body.parameters(), own.weight)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)) and found[0][0].abs().max() > 1e-3
    body.zero_grad(), own.zero_grad()
    p, q = own(body(teacher)) / 0.8, own(body(student.detach())) / 0.8
    (weights * (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1)).sum().backward()
    assert not torch.allclose(own.weight.grad, found[0][-1], atol=1e-3), "the control: a teacher with a gradient"


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_gradient_of_the_forward_kl_is_the_difference_of_the_distributions(temperature):
    """d KL(p_T || p_S) / d logits = (p_S - p_T) / temperature; the logits themselves are the states here."""
    generator = torch.Generator().manual_seed(4)
    student, teacher = torch.randn(T, V, generator=generator), torch.randn(T, V, generator=generator)
    weights = torch.arange(1.0, T + 1)
    student.requires_grad_()
    divergence(
        student, teacher, torch.zeros(T, dtype=torch.long), weights, torch.nn.Identity(), torch.nn.Identity(),
        temperature=temperature,
    ).total.backward()  # fmt: skip
    expected = ((student / temperature).softmax(-1) - (teacher / temperature).softmax(-1)) / temperature
    assert torch.allclose(student.grad, expected * weights[:, None], atol=1e-6)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_equal_states_are_no_distance_and_pull_nowhere(direction):
    student, _, ids, weights, own, _ = make(5)
    found = divergence(student, student.detach(), ids, weights, own, own, direction=direction)
    found.total.backward()
    assert found.per_token.abs().max() < 1e-6 and student.grad.abs().max() < 1e-6 and not found.gap.any()


def test_weights_scale_tokens_one_by_one():
    student, teacher, ids, weights, own, other = make(6)
    for t in range(T):
        one = torch.zeros(T)
        one[t] = 3.0
        found = divergence(student, teacher, ids, one, own, other)
        assert found.total.item() == pytest.approx(3 * found.per_token[t].item(), rel=1e-6)
    assert divergence(student, teacher, ids, weights * 0, own, other).total.item() == 0


def test_jensen_shannon_never_exceeds_log_two_and_the_others_do():
    student, teacher, ids, weights, own, other = make(7)
    far = {d: divergence(student * 40, teacher * 40, ids, weights, own, other, direction=d) for d in DIRECTIONS}
    assert far["jensen_shannon"].per_token.max() <= math.log(2) + 1e-6
    assert far["jensen_shannon"].per_token.max() > 0.9 * math.log(2)
    assert far["forward"].per_token.max() > 5 < far["reverse"].per_token.max()
    assert all((f.per_token >= -1e-6).all() for f in far.values())


def test_no_tokens_are_no_loss_but_still_a_graph():
    student, teacher, ids, weights, own, other = make()
    found = divergence(student[:0], teacher[:0], ids[:0], weights[:0], own, other)
    found.total.backward()
    assert found.total.item() == 0 and len(found.per_token) == len(found.gap) == 0
    assert not student.grad.any()


def test_half_precision_states_are_compared_in_float32():
    student, teacher, ids, weights, own, other = make(8)
    half = divergence(
        student.bfloat16(), teacher.bfloat16(), ids, weights, own.bfloat16(), other.bfloat16(), slice_elements=V
    )
    assert half.per_token.dtype == half.total.dtype == torch.float32


def test_an_unknown_direction_names_its_key():
    with pytest.raises(ValueError, match=r"variant\.direction='sideways': use one of forward") as error:
        divergence(*make(), direction="sideways")
    assert "\n" not in str(error.value)

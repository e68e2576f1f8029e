"""The triplet losses against values worked by hand and against plain loops."""

import pytest
import torch

from icekit.learning.triplet import intrinsic_triplet, object_triplet


def test_object_triplet_by_hand() -> None:
    anchor = torch.tensor([[1.0, 0.0]])
    category = torch.tensor([[0.6, 0.8]])  # d = (0.16 + 0.64) / 2 = 0.4
    instance = torch.tensor([[0.8, 0.6]])  # d = (0.04 + 0.36) / 2 = 0.2
    assert object_triplet(anchor, category, instance, margin=0.05).item() == pytest.approx(0.25)
    assert object_triplet(anchor, instance, category, margin=0.05).item() == 0.0
    both = object_triplet(anchor.repeat(2, 1), torch.cat([category, instance]), torch.cat([instance, category]))
    assert both.item() == pytest.approx(0.125)


def test_a_satisfied_object_triplet_is_zero_with_zero_gradient() -> None:
    anchor = torch.tensor([[1.0, 0.0]])
    category = anchor.clone().requires_grad_()
    instance = torch.tensor([[0.0, 1.0]], requires_grad=True)
    loss = object_triplet(anchor, category, instance)
    loss.backward()
    assert loss.item() == 0.0
    assert category.grad is not None and torch.equal(category.grad, torch.zeros(1, 2))
    assert instance.grad is not None and torch.equal(instance.grad, torch.zeros(1, 2))


def test_object_triplet_pulls_the_category_and_pushes_the_instance() -> None:
    anchor = torch.tensor([[1.0, 0.0]])
    category = torch.tensor([[0.6, 0.8]], requires_grad=True)
    instance = torch.tensor([[0.6, 0.8]], requires_grad=True)
    object_triplet(anchor, category, instance).backward()
    assert category.grad is not None and instance.grad is not None
    towards = anchor - category.detach()
    assert (-category.grad * towards).sum() > 0
    assert (-instance.grad * towards).sum() < 0


def test_intrinsic_triplet_by_hand() -> None:
    # One dimension, a = (0, 1), t = (0.5, 1): gamma = 0.7 both ways.
    # j=0, k=1: 0.25 - 1 + 0.7 = -0.05 -> 0;  j=1, k=0: 0 - 0.25 + 0.7 = 0.45.  Mean over the two pairs: 0.225.
    anchors, tokens = torch.tensor([[[0.0], [1.0]]]), torch.tensor([[[0.5], [1.0]]])
    assert intrinsic_triplet(anchors, tokens).item() == pytest.approx(0.225)


def test_intrinsic_triplet_hinges_each_element() -> None:
    # The second dimension is satisfied by far (-1 per pair) and must not offset the first (0.225).
    anchors = torch.tensor([[[0.0, 0.0], [1.0, 0.0]]])
    tokens = torch.tensor([[[0.5, 0.0], [1.0, 0.0]]])
    tokens[..., 1] = torch.tensor([0.0, 9.0])  # j=0: 0 - 81 -> 0; j=1: 81 - 0 = 81
    expected = ((0.0 + 0.0) + (0.45 + 81.0)) / 4
    assert intrinsic_triplet(anchors, tokens).item() == pytest.approx(expected)


def test_intrinsic_triplet_over_tokens_by_hand() -> None:
    # One dimension: the category's anchor is 0, the attributes' 1 and 2; the tokens are 0.5, 1.5 and 1; scale 0.7.
    # Category: own 0.25; rivals 1.5: 0.25 - 2.25 + 0.7 -> 0; 1: 0.25 - 1 + 2.8 = 2.05.  Mean over two: 1.025.
    # First attribute: own 0.25; rival 1 (not the category's 0.5): 0.25 - 0 + 0.7 = 0.95.
    # Second: own 1; rival 1.5: 1 - 0.25 + 0.7 = 1.45.  Sum over the three tokens: 3.425.
    anchors, tokens = torch.tensor([[[0.0], [1.0], [2.0]]]), torch.tensor([[[0.5], [1.5], [1.0]]])
    assert intrinsic_triplet(anchors, tokens, form="tokens").item() == pytest.approx(3.425)
    # All pairs: the category's token at the attributes' anchors, too: 0.25 - 0.25 + 0.7 = 0.7, 1 - 2.25 + 2.8 = 1.55.
    assert intrinsic_triplet(anchors, tokens).item() == pytest.approx((0 + 2.05 + 0.95 + 1.45 + 0.7 + 1.55) / 6)


@pytest.mark.parametrize("attributes", [1, 2, 4])
def test_intrinsic_triplet_over_tokens_equals_plain_loops(attributes: int) -> None:
    generator = torch.Generator().manual_seed(attributes)
    anchors = torch.randn(3, 1 + attributes, 6, generator=generator)
    tokens = torch.randn(3, 1 + attributes, 6, generator=generator)
    total = torch.tensor(0.0)
    for c in range(3):
        for j in range(1 + attributes):
            rivals = [k for k in range(1, 1 + attributes) if k != j]
            terms = []
            for k in rivals:
                gamma = 0.7 * (anchors[c, j] - anchors[c, k]) ** 2
                hinge = (anchors[c, j] - tokens[c, j]) ** 2 - (anchors[c, j] - tokens[c, k]) ** 2 + gamma
                terms.append(hinge.clamp(min=0).mean())
            total += torch.stack(terms).mean() / 3 if terms else 0.0
    torch.testing.assert_close(intrinsic_triplet(anchors, tokens, form="tokens"), total)


@pytest.mark.parametrize("attributes", [2, 4])
def test_where_all_pairs_are_alike_the_mean_over_them_is_weaker_by_the_number_of_tokens(attributes: int) -> None:
    anchors = torch.zeros(1, 1 + attributes, 5)
    anchors[0, range(1 + attributes), range(1 + attributes)] = 1.0
    tokens = torch.zeros(1, 1 + attributes, 5).requires_grad_()
    pairs, over_tokens = (intrinsic_triplet(anchors, tokens, form=form) for form in ("pairs", "tokens"))
    assert (over_tokens / pairs).item() == pytest.approx(1 + attributes)


@pytest.mark.parametrize("slots", [2, 3, 7])
def test_intrinsic_triplet_equals_plain_loops(slots: int) -> None:
    generator = torch.Generator().manual_seed(slots)
    anchors = torch.randn(4, slots, 6, generator=generator)
    tokens = torch.randn(4, slots, 6, generator=generator)
    terms = []
    for c in range(4):
        for j in range(slots):
            for k in set(range(slots)) - {j}:
                gamma = 0.7 * (anchors[c, j] - anchors[c, k]) ** 2
                hinge = (anchors[c, j] - tokens[c, j]) ** 2 - (anchors[c, j] - tokens[c, k]) ** 2 + gamma
                terms.append(hinge.clamp(min=0).mean())
    torch.testing.assert_close(intrinsic_triplet(anchors, tokens), torch.stack(terms).mean())


def test_intrinsic_triplet_of_tokens_on_their_anchors_is_zero_and_finite() -> None:
    anchors = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    tokens = anchors.clone().requires_grad_()
    loss = intrinsic_triplet(anchors, tokens)
    loss.backward()
    assert loss.item() == 0.0
    assert tokens.grad is not None and torch.equal(tokens.grad, torch.zeros_like(tokens))


def test_one_slot_has_nothing_to_be_pushed_from() -> None:
    for form in ("pairs", "tokens"):
        tokens = torch.randn(2, 1, 5, requires_grad=True)
        loss = intrinsic_triplet(torch.zeros(1, 1, 5), tokens, form=form)
        loss.backward()
        assert loss.item() == 0.0

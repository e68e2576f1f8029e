"""The training loop of learners against PyTorch's own AdamW, on losses whose gradient is known."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from learning import Killed, Memory
from torch import Tensor, nn

from icekit.learning.training import Group, Losses, Task, Trainer, TrainingSettings
from icekit.protocols import Step

NAMES = ("<a>", "<b>", "<c>")
RATE = 1e-2


def gradient(step: int) -> Tensor:
    """Of all three rows ``[3, 4]`` in a step: some longer than the clip, some shorter."""
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(step)) * (2.0 if step % 3 else 0.1)


def drawn(step: int) -> int:
    """Which of the rows a and b a step of the first phase is of; in the second, of a and c: b is no more in it."""
    return int(torch.randint(2, (1,), generator=torch.Generator().manual_seed(step)))


class Training:
    """Two phases of 10 steps, one row drawn a step: a and b, then a and c, which starts as b is then."""

    def __init__(self, checkpoint: Memory, kill_at: int | None = None, keeps_length: bool = False) -> None:
        self.keeps_length = keeps_length
        start = torch.linspace(-1, 1, 12).view(3, 4)
        self.rows = {name: nn.Parameter(row.clone(), False) for name, row in zip(NAMES, start, strict=True)}
        self.kill_at = kill_at
        settings = TrainingSettings(weight_decay=0.1, checkpoint_every=3)
        task: Any = Task(torch.zeros(3, 4, 4), (), (), 0, checkpoint, self._on_step)
        tokens = {name: {"clip_l": row} for name, row in self.rows.items()}
        self.trainer = Trainer(tokens, settings, task, 20)

    def _on_step(self, step: Step) -> None:
        if step.step == self.kill_at:
            raise Killed

    def _losses(self, step: int) -> Iterator[Losses]:
        weights = dict(zip(NAMES, gradient(step), strict=True))
        total = sum((self.rows[n] * weights[n]).sum() for n in NAMES if self.rows[n].requires_grad)
        assert isinstance(total, Tensor)
        yield {"total": total}

    def run(self, *, one_optimizer: bool) -> Tensor:
        for phase, (first, second), steps in (("1", "ab", range(1, 11)), ("2", "ac", range(11, 21))):
            if phase == "2" and self.trainer.done == 10:
                self.rows["<c>"].data.copy_(self.rows["<b>"].data)
            groups = [
                Group(
                    {f"<{letter}>": self.rows[f"<{letter}>"]},
                    RATE,
                    takes_part=lambda step, i=i: drawn(step) == i,  # type: ignore[misc]
                    keeps_length=self.keeps_length,
                )
                for i, letter in enumerate((first, second))
            ]
            self.trainer.train(phase, groups, steps, self._losses, one_optimizer=one_optimizer)
        return torch.stack([row.detach() for row in self.rows.values()])


def adamw(parameters: list[nn.Parameter]) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.1)


def test_one_optimizer_is_adamw_of_one_table() -> None:
    """Rows that are not a step's get a gradient of zero, the clip is over the whole, and AdamW goes on through both
    phases; what is frozen, or starts anew, is written into the table.
    """
    table = nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4))
    optimizer = adamw([table])
    for step in range(1, 21):
        held = table.detach().clone()
        row = (0, 1 if step <= 10 else 2)[drawn(step)]
        table.grad = torch.zeros(3, 4)
        table.grad[row] = gradient(step)[row]
        nn.utils.clip_grad_norm_([table], 1.0)
        optimizer.step()
        still = 2 if step <= 10 else 1  # not trained in this phase
        table.data[still] = held[still]
        if step == 10:
            table.data[2] = table.data[1]
    torch.testing.assert_close(Training(Memory()).run(one_optimizer=True), table.detach())


def test_each_is_an_adamw_for_every_group_and_phase() -> None:
    """A row that is not a step's stays, and its AdamW does not count the step."""
    rows = [nn.Parameter(row.clone()) for row in torch.linspace(-1, 1, 12).view(3, 4)]
    for present, steps in (((0, 1), range(1, 11)), ((0, 2), range(11, 21))):
        if steps.start == 11:
            rows[2].data.copy_(rows[1].data)
        optimizers = [adamw([rows[i]]) for i in present]
        for step in steps:
            i = present[drawn(step)]
            rows[i].grad = gradient(step)[i]
            nn.utils.clip_grad_norm_([rows[i]], 1.0)
            optimizers[drawn(step)].step()
    torch.testing.assert_close(Training(Memory()).run(one_optimizer=False), torch.stack([row.detach() for row in rows]))


def test_rows_that_keep_their_length() -> None:
    """Each step is AdamW's, and then the row is as long as it was: its direction alone is learned."""
    row = nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4)[0].clone())
    optimizer, length = adamw([row]), float(row.detach().norm())
    for step in (step for step in range(1, 11) if drawn(step) == 0):
        row.grad = gradient(step)[0]
        nn.utils.clip_grad_norm_([row], 1.0)
        optimizer.step()
        row.data *= length / row.data.norm()
    learned = Training(Memory(), keeps_length=True).run(one_optimizer=False)
    other = Training(Memory()).run(one_optimizer=False)
    # Row a goes on in phase two, with a fresh AdamW and from where it is.
    optimizer = adamw([row])
    for step in (step for step in range(11, 21) if drawn(step) == 0):
        row.grad = gradient(step)[0]
        nn.utils.clip_grad_norm_([row], 1.0)
        optimizer.step()
        row.data *= length / row.data.norm()
    torch.testing.assert_close(learned[0], row.detach())
    assert learned[0].norm() == pytest.approx(length) and other[0].norm() != pytest.approx(length, rel=1e-3)


@pytest.mark.parametrize("keeps_length", [True, False])
@pytest.mark.parametrize("one_optimizer", [True, False])
def test_killed_at_any_step_it_goes_on_bit_for_bit(one_optimizer: bool, keeps_length: bool) -> None:
    whole = Training(Memory(), None, keeps_length).run(one_optimizer=one_optimizer)
    for kill_at in range(1, 21):
        memory = Memory()
        with pytest.raises(Killed):
            Training(memory, kill_at, keeps_length).run(one_optimizer=one_optimizer)
        assert torch.equal(Training(memory, None, keeps_length).run(one_optimizer=one_optimizer), whole), kill_at


def test_a_row_that_comes_after_400_steps_moves_faster_than_with_a_fresh_adamw() -> None:
    """With a gradient that stays: 1.8 times as far in its first step, 3.8 in its 12th, 3.5 in 20 together."""

    def steps_of(done: int) -> Tensor:
        row = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = torch.optim.AdamW([row], lr=1.0, weight_decay=0.0)
        places = [0.0]
        for step in range(done + 20):
            row.grad = torch.full_like(row, 0.0 if step < done else 0.3)
            optimizer.step()
            places.append(row.item())
        return -torch.tensor(places).diff()[done:]

    ratio = steps_of(400) / steps_of(0)
    n = torch.arange(1, 21)
    expected = (1 - 0.9**n) * ((1 - 0.999 ** (400 + n)) / (1 - 0.999**n)).sqrt()
    torch.testing.assert_close(ratio, expected, rtol=1e-4, atol=0)
    assert ratio[0].item() == pytest.approx(1.82, abs=0.005)
    assert (int(ratio.argmax()) + 1, ratio.max().item()) == (12, pytest.approx(3.82, abs=0.005))
    assert ratio.mean().item() == pytest.approx(3.48, abs=0.005)

    # The loop gives such a row the same: 400 steps of one row, then another comes.
    memory = Memory()
    rows = {name: nn.Parameter(torch.zeros(1), False) for name in ("<old>", "<new>")}
    places: list[float] = []
    task: Any = Task(torch.zeros(3, 4, 4), (), (), 0, memory, lambda _: places.append(rows["<new>"].item()))
    settings = TrainingSettings(weight_decay=0.0)
    trainer = Trainer({name: {"clip_l": row} for name, row in rows.items()}, settings, task, 420)
    for name, steps in (("<old>", range(1, 401)), ("<new>", range(401, 421))):
        trainer.train(
            name,
            [Group({name: rows[name]}, RATE)],
            steps,
            lambda _, name=name: iter([{"total": 0.3 * rows[name].sum()}]),  # type: ignore[misc]
            one_optimizer=True,
        )
    torch.testing.assert_close(-torch.tensor(places[399:]).diff() / RATE, expected, rtol=1e-3, atol=0)

"""The place of a run, kept in checkpoints: what it says when the plan of an epoch has changed meanwhile."""

import json

import pytest

from toolkit.training.distributed import World
from toolkit.training.limits import RunLength
from toolkit.training.progress import Progress


def progress(*, updates_per_epoch: int, plan: str) -> Progress:
    made = Progress(RunLength(max_updates=20, max_minutes=None), World())
    made.length.start(update=0)
    made.updates_per_epoch, made.plan_digest = updates_per_epoch, plan
    return made


def saved(*, updates: int) -> dict:
    before = progress(updates_per_epoch=8, plan="one")
    for _ in range(updates):
        before.advance()
    return json.loads(json.dumps(before.state_dict()))


@pytest.mark.parametrize(
    ("updates_per_epoch", "plan", "place", "words"),
    [
        (8, "one", (1, 3), None),
        (8, "", (1, 3), None),  # a loader that has no plan to compare
        (8, "other", (1, 3), "the updates of an epoch hold other utterances than when the checkpoint was saved"),
        (16, "other", (1, 6), "an epoch had 8 updates when the checkpoint was saved and has 16 now"),
    ],
)
def test_a_plan_that_changed_is_told(updates_per_epoch, plan, place, words):
    resumed = progress(updates_per_epoch=updates_per_epoch, plan=plan)
    warning = resumed.load_state_dict(saved(updates=11))
    assert (resumed.epoch, resumed.epoch_update) == place and resumed.update == 11
    assert (warning is None) if words is None else warning.startswith(words)

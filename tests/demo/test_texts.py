"""The demo's data: no held-out answer is in the training data, and the task requires reading."""

from __future__ import annotations

import random

from hynb.demo import car_samples
from hynb.demo.run import HELD_OUT_SAMPLES, SEED, TRAIN_SAMPLES
from hynb.demo.texts import article, pretraining_conversation


def parts(sample: dict) -> tuple[str, str]:
    """The text of a question, and its answer."""
    return sample["messages"][1]["content"], sample["messages"][-1]["content"]


def test_cars_of_held_out_samples_are_in_no_training_text():
    training, held_out = car_samples(TRAIN_SAMPLES, HELD_OUT_SAMPLES, seed=SEED)
    texts = "\n".join(parts(sample)[0] for sample in training)
    for sample in held_out:
        text, car = parts(sample)
        assert car not in texts
        assert car in text, "the answer is in the text of its question"
    assert (training, held_out) == car_samples(TRAIN_SAMPLES, HELD_OUT_SAMPLES, seed=SEED)
    assert {text[0].isascii() for text, _ in map(parts, held_out)} == {True, False}, "Chinese and English"


def test_no_simple_rule_answers_the_questions():
    """The place of the answer varies over the whole text, and each text mentions at least two other things."""
    rng = random.Random(1)
    places, ranks = [], set()
    for _ in range(200):
        made = article(rng, with_car=True)
        assert len(made.things) >= 3
        found = {kind: made.text.index(thing) for kind, thing in made.things.items()}
        places.append(found["car"] / len(made.text))
        ranks.add(sorted(found, key=found.__getitem__).index("car"))
    assert min(places) < 0.1 and max(places) > 0.6
    assert ranks == {0, 1, 2, 3, 4}, "the car is the first to the last of the things"


def test_pretraining_never_asks_for_a_car():
    rng = random.Random(0)
    for _ in range(3000):
        question, _ = parts(pretraining_conversation(rng))
        assert "车系" not in question and "car series" not in question

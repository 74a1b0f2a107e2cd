"""Stage A: what it learns of visibility from data that has points alone."""

import dataclasses

import numpy as np
import torch
from handmstn.config import AlignerSettings, RecognizerSettings, TrainSettings
from handmstn.data import rendered
from handmstn.parts import preset
from handmstn.training import Points, _as_pointed, found_points, train_aligner


def test_points_without_visibility_teach_that_a_hand_is_seen_and_a_shuffled_picture_is_none():
    torch.set_num_threads(1)
    settings = TrainSettings(
        data="hands",
        device="cpu",
        aligner=AlignerSettings(backbone="hand:loc", loc_size=32, steps=60, batch_size=12, lr=3e-3, visibility=1.0),
        recognizer=RecognizerSettings(palm_size=16, finger_size=(16, 8)),
    )
    reading = dataclasses.replace(settings.reading, size=32, people=6, views=4)
    hands = rendered(reading)
    unknown = dataclasses.replace(hands, visibility=np.full_like(hands.visibility, np.nan))
    aligner = train_aligner(unknown, settings, 0, quiet=True)
    _, visible = found_points(Points(aligner), hands)
    assert visible.mean() > 0.6


def test_a_part_counts_as_seen_where_all_its_points_are_known():
    points = torch.zeros(2, 39, 2)
    points[1, 10] = float("nan")  # of the thumb
    found = _as_pointed(points, preset("hand6"))
    assert found[0].tolist() == [1.0] * 6
    assert torch.isnan(found[1]).tolist() == [False, True, False, False, False, False]

import numpy as np

from spd_analysis.clustering.known import features_found, features_joined, modules_held

NAMES = ["in:1", "in:0", "out:0", "out:2", "out:1"]
# Feature 0 is in:0 and out:2, feature 1 is in:1 and out:0; out:1 is a little of both.
CI = {
    "in": np.array([[1.0, 0.0, 0.0], [0.1, 0.9, 0.0]]),
    "out": np.array([[0.0, 0.3, 0.8], [1.0, 0.3, 0.0]]),
}


def found(labels, which=features_found):
    return which(modules_held(CI, NAMES, np.array(labels)), 2).tolist()


def test_a_feature_needs_a_group_of_its_own_with_every_module():
    assert found([0, 1, 0, 1, 2]) == [True, True]
    assert found([0, 1, 0, 1, 1]) == [True, True]
    assert found([0, 1, 0, 2, 2]) == [False, True]
    assert found([0, 1, 2, 3, 4]) == [False, False]


def test_two_features_in_one_group_count_once():
    assert sum(found([0, 0, 0, 0, 0])) == 1


def test_a_feature_is_joined_in_a_group_of_several_features_too():
    assert found([0, 0, 0, 0, 0], features_joined) == [True, True]
    assert found([0, 1, 1, 1, 1], features_joined) == [True, False]
    assert found([0, 1, 2, 3, 4], features_joined) == [False, False]


def test_labels_need_not_be_a_range():
    assert found([7, 3, 7, 3, 9]) == [True, True]

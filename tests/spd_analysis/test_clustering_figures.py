import numpy as np
import pytest
from clustering_oracle import binary, random_active

from spd_analysis.clustering.config import DEFAULT, load_config
from spd_analysis.clustering.figures import draw_clustering
from spd_analysis.clustering.merge import cluster


@pytest.mark.parametrize("n, overrides", [
    (1, ()), (2, ()), (12, ("pop_component_prob=0.5", "iters=40")),
])  # fmt: skip
def test_a_picture_of_every_size(n, overrides, tmp_path):
    from matplotlib.image import imread

    activations = binary(random_active(100, n, seed=1))
    history = cluster(activations, load_config(DEFAULT, overrides), lambda _: None)
    draw_clustering(history, activations, "a title", tmp_path / "picture.png")
    pixels = imread(tmp_path / "picture.png")
    assert pixels.shape[0] > 500 and len(np.unique(pixels.reshape(-1, 4), axis=0)) > 50

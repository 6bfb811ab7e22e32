import sys

import numpy as np
import pytest

from fastseg.training import class_names, drawing
from fastseg.training.drawing import Scene

pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")


def test_a_drawing_that_fails_leaves_no_file(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    def full(self, target, **options):
        target.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    scene = Scene(np.zeros((4, 4, 3), np.uint8), None, np.zeros((4, 4), np.uint8))
    with pytest.raises(OSError, match="No space left"):
        drawing.draw_scenes(tmp_path / "drawing.png", [scene], ("a", "b"), 255)
    assert not list(tmp_path.iterdir())


def test_the_legend_has_the_classes_that_occur(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    legends = []
    monkeypatch.setattr(Figure, "legend", lambda self, handles, **_: legends.append([h.get_label() for h in handles]))
    picture, one, ignored = np.zeros((4, 4, 3), np.uint8), np.ones((4, 4), np.uint8), np.full((4, 4), 255)
    scenes = [Scene(picture, ignored, one), Scene(picture, None, 2 * one)]
    drawing.draw_scenes(tmp_path / "drawing.png", scenes, ("a", "b", "c", "d"), 255)
    assert legends == [["b", "c", "void"]]


def test_each_class_has_a_colour_of_its_own():
    assert drawing.palette(class_names.CAMVID_CLASSES)[class_names.CAMVID_CLASSES.index("Road")].tolist() == [
        128,
        64,
        128,
    ]
    for classes in (2, 11, 40):
        colours = drawing.palette(range(classes))
        assert colours.dtype == np.uint8 and len({tuple(colour) for colour in colours}) == classes
    labels = np.array([[0, 1], [255, 1]])
    coloured = drawing.colourise(labels, np.array([[1, 2, 3], [4, 5, 6]], np.uint8), 255)
    assert coloured.tolist() == [[[1, 2, 3], [4, 5, 6]], [[0, 0, 0], [4, 5, 6]]]


def test_without_matplotlib_the_error_says_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "fastseg-kernels\[demo\]"'):
        drawing.draw_scenes(tmp_path / "x.png", [], (), 255)

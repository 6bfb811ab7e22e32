import pytest
import torch
from support.folders import write_folder

from fastseg.training import class_names, class_weights, data

pytest.importorskip("PIL.Image")


def test_specifications():
    pytest.importorskip("sklearn")
    scenes = data.DigitScenes("train", length=5)
    assert class_weights.class_weights("none", scenes) is None
    assert torch.equal(class_weights.class_weights("camvid", scenes), torch.tensor(class_names.CAMVID_CLASS_WEIGHTS))
    computed = class_weights.median_frequency_weights(class_weights.label_counts(scenes))
    assert torch.equal(class_weights.class_weights("median-frequency", scenes), computed) and computed[10] < 1
    assert class_weights.class_weights("1,0,1,1,1,1,1,1,1,1,.5", scenes).tolist()[9:] == [1, 0.5]
    for wrong in ("heavy", "1,2", "1,1,1,1,1,1,1,1,1,1,-1", "1,1,1,1,1,1,1,1,1,1,nan"):
        with pytest.raises(ValueError, match="class_weights must be"):
            class_weights.class_weights(wrong, scenes)


def test_median_frequency(tmp_path):
    masks = [[[0, 0], [0, 1]], [[0, 0], [11, 11]]]
    dataset = data.FolderDataset(
        write_folder(tmp_path, masks), "train", data.LabelOptions(num_classes=3, ignore_index=11)
    )
    counts = class_weights.label_counts(dataset)
    frequencies = class_weights.class_frequencies(counts)
    want = torch.tensor([5 / 6, 1 / 4, torch.nan], dtype=torch.float64)
    torch.testing.assert_close(frequencies, want, equal_nan=True)
    weights = class_weights.median_frequency_weights(counts)
    median = (5 / 6 + 1 / 4) / 2
    torch.testing.assert_close(weights, torch.tensor([median * 6 / 5, median * 4, 0]))


def test_camvids_weights_are_in_the_order_of_its_classes():
    weights = dict(zip(class_names.CAMVID_CLASSES, class_names.CAMVID_CLASS_WEIGHTS, strict=True))
    assert max(weights, key=weights.get) == "SignSymbol" and min(weights, key=weights.get) == "Road"

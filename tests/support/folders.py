"""Folders of images and masks."""

import numpy as np
from PIL import Image

from fastseg.training.data import DigitScenes


def write_folder(root, masks, suffix=".png", splits=("train",)):
    """Write a folder in CamVid's layout. The frame of a mask is grey, with 20 times the label in each pixel."""
    for split in splits:
        for folder in (split, f"{split}annot"):
            (root / folder).mkdir(parents=True)
        for number, mask in enumerate(masks):
            mask = np.asarray(mask, np.uint8)
            frame = np.repeat(mask[..., None] * 20, 3, 2)
            Image.fromarray(frame).save(root / split / f"f{number}{suffix}", quality=100)
            Image.fromarray(mask).save(root / f"{split}annot" / f"f{number}.png")
    return root


def write_scene(folder, size):
    """Write scene.png and mask.png of a digit scene, (height, width) `size`, and return both paths."""
    image, mask = DigitScenes("val", size=size).sample(0)
    Image.fromarray((image * 255).byte().permute(1, 2, 0).numpy()).save(folder / "scene.png")
    Image.fromarray(mask.byte().numpy()).save(folder / "mask.png")
    return folder / "scene.png", folder / "mask.png"

"""Draw docs/images/scenes.jpg, training scenes above and held-out ones below: `python docs/figures/scenes.py`."""

from pathlib import Path

import numpy as np
from PIL import Image

from dat_ref.scenes import SPLITS, Scenes

SIZE, GAP, COLUMNS = 160, 6, 7


def contact_sheet():
    """Return the contact sheet: (H, W, 3) uint8."""
    side = SIZE + GAP
    grid = np.full((len(SPLITS) * side - GAP, COLUMNS * side - GAP, 3), 255, np.uint8)
    for row, split in enumerate(SPLITS):
        for column in range(COLUMNS):
            image = Scenes("find_all", split, SIZE, objects="pictures")[column].image
            grid[row * side :, column * side :][:SIZE, :SIZE] = image
    return grid


if __name__ == "__main__":
    Image.fromarray(contact_sheet()).save(Path(__file__).parents[1] / "images" / "scenes.jpg", quality=88)

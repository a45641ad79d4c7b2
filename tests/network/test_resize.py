import numpy as np
import pytest
import torch
from PIL import Image

from carrara.network.resize import enlarge, shrink


def test_shrinking_is_the_mean_of_squares():
    images = torch.rand(2, 3, 6, 4, dtype=torch.float64)
    small = shrink(images, 2)
    for row in range(3):
        for column in range(2):
            square = images[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            torch.testing.assert_close(small[:, :, row, column], square.mean((2, 3)))
    with pytest.raises(ValueError, match="cannot be shrunk by 4"):
        shrink(images, 4)


@pytest.mark.parametrize("factor", [2, 4])
def test_enlarging_is_pillows(factor):
    image = torch.rand(1, 1, 6, 5)
    theirs = Image.fromarray(image[0, 0].numpy()).resize((5 * factor, 6 * factor), Image.Resampling.BICUBIC)
    torch.testing.assert_close(enlarge(image, factor)[0, 0], torch.from_numpy(np.array(theirs)), atol=1e-5, rtol=0)

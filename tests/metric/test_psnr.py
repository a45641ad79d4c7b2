import math

import pytest
import torch

from carrara.metric.psnr import PSNR, psnr


def test_known_error():
    reference = torch.full((2, 3, 8, 8), 100, dtype=torch.uint8)
    image = reference.clone()
    image[0] += 5
    image[1, :, :4] += 10
    expected = [20 * math.log10(255 / 5), 10 * math.log10(255**2 / 50)]
    assert psnr(image, reference).tolist() == pytest.approx(expected)
    metric = PSNR()
    metric.update(image[:1], reference[:1])
    metric.update(image[1:], reference[1:])
    assert float(metric.compute()) == pytest.approx(sum(expected) / 2)  # the mean of decibels, not of errors


def test_float_images_are_rounded_as_they_would_be_on_disk():
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    floats = levels.float() / 127.5 - 1
    assert torch.equal(psnr(floats + 0.003, levels), psnr(levels, levels))
    assert torch.equal(psnr(floats * 1.5, levels), psnr((floats * 1.5).clamp(-1, 1), levels))
    assert psnr(floats + 0.005, levels) < psnr(levels, levels)


def test_equal_images_are_finite():
    image = torch.zeros(1, 3, 32, 32)
    off_by_one = image.clone()
    off_by_one[0, 0, 0, 0] += 1 / 127.5
    assert float(psnr(image, image)) == pytest.approx(10 * math.log10(255**2 * 3 * 32 * 32))
    assert psnr(image, image) == psnr(off_by_one, image)


def test_mismatches_are_errors():
    with pytest.raises(ValueError, match="differ in shape"):
        psnr(torch.zeros(2, 3, 4, 4), torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match="uint8 or float"):
        psnr(torch.zeros(1, 3, 4, 4, dtype=torch.int64), torch.zeros(1, 3, 4, 4))

"""Aspect-ratio buckets: each image where least of it is cut, each batch of one size, a function of the iteration."""

import io
from collections import Counter
from fractions import Fraction

import pytest
import torch
from PIL import Image

from diffalign import media
from diffalign.data.buckets import Buckets, bucket_sizes, image_sizes, kept_share, nearest_bucket
from diffalign.data.crops import CropParams, frame
from diffalign.structures import ImageSource, LabelledImage, Prompt

SDXL = bucket_sizes((1024, 1024), 64)


def permutation(count, stream, *address):
    seed = hash((stream, *address)) % 2**31
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def encoded(size, orientation=1):
    image, file = Image.new("RGB", size), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(file, "JPEG", exif=exif)
    return file.getvalue()


def test_the_sizes_are_those_of_sdxl():
    """The paper's table 5 lists sizes whose area is 1024 x 1024 at most, in steps of 64, up to a ratio of 4."""
    assert {(1024, 1024), (1152, 896), (832, 1216), (1536, 640), (512, 2048), (2048, 512)} <= set(SDXL)
    for height, width in SDXL:
        assert height % 64 == width % 64 == 0
        assert height * width <= 1024 * 1024
        assert max(height, width) <= 4 * min(height, width)


@pytest.mark.parametrize(("base", "step"), [((64, 64), 16), ((64, 96), 8), ((512, 768), 64)])
def test_the_resolution_itself_is_a_bucket_and_unusable_sizes_are_none(base, step):
    sizes = bucket_sizes(base, step, lambda size: max(size) <= 2 * base[0])
    assert sizes[0] == base
    assert len(set(sizes)) == len(sizes) > 2
    assert max(map(max, sizes)) <= max(*base, 2 * base[0])


def test_each_image_is_in_the_bucket_of_the_least_crop():
    generator = torch.Generator().manual_seed(0)
    for height, width in torch.randint(100, 3000, (200, 2), generator=generator).tolist():
        chosen = nearest_bucket([(height, width)], SDXL)
        left = []
        for bucket in SDXL:  # counted in pixels of the image that remain
            scale = max(Fraction(bucket[0], height), Fraction(bucket[1], width))
            left.append(Fraction(bucket[0] * bucket[1]) / (scale * height * scale * width))
            assert left[-1] == kept_share((height, width), bucket)
        assert left[chosen] == max(left)


def test_a_pair_is_where_both_images_lose_least():
    assert SDXL[nearest_bucket([(1024, 1024), (1024, 1024)], SDXL)] == (1024, 1024)
    both = SDXL[nearest_bucket([(800, 1200), (1000, 1200)], SDXL)]
    assert Fraction(800, 1200) <= Fraction(*both) <= Fraction(1000, 1200)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_sizes_are_those_of_the_upright_image(orientation):
    content = encoded((60, 20), orientation)
    sample = LabelledImage("one", Prompt(""), ImageSource("one", content), True)
    assert image_sizes(sample) == [media.decode(content).size[::-1]]


def test_an_unreadable_image_has_no_size():
    assert image_sizes(LabelledImage("one", Prompt(""), ImageSource("one", b"none"), True)) == []


@pytest.mark.parametrize("count", [1, 3, 4, 11])
def test_batches_are_of_one_bucket_and_every_epoch_of_it_uses_each_image_once(count):
    of = [0, 1, 1, 2, 0, 0, 0, 0, 1, 0, -1, 2]
    buckets = Buckets(((8, 8), (8, 16), (16, 8)), of, count, permutation, "data")
    seen: dict[tuple[int, int], Counter] = {size: Counter() for size in buckets.sizes}
    epochs = 60
    total = sum(buckets._batches(epochs * count).values())
    order = [buckets.take(iteration) for iteration in range(total)]
    for size, indices in order:
        assert len(indices) == count
        assert {buckets.sizes[of[index]] for index in indices} == {size}
        seen[size].update(indices)
    for bucket, size in enumerate(buckets.sizes):
        own = [index for index, b in enumerate(of) if b == bucket]
        assert seen[size] == dict.fromkeys(own, epochs * count)
    if count < 4:
        assert len({size for size, _ in order[:20]}) == 3  # in random order, not one bucket after the other
        assert order[:20] != order[20:40]


def test_an_iteration_depends_on_its_number_alone():
    def make():
        return Buckets(((8, 8), (8, 16)), [0, 1, 0, 1, 0], 2, permutation, "data")

    whole = [make().take(iteration) for iteration in range(30)]
    resumed = make()
    assert [resumed.take(iteration) for iteration in range(17, 30)] == whole[17:]


def test_a_bucket_smaller_than_a_batch_is_named():
    buckets = Buckets(((8, 8), (8, 16)), [0, 0, 0, 1], 3, permutation, "data")
    assert "1 of 2 aspect buckets" in buckets.warning()
    assert "8 x 16 has 1" in buckets.warning()
    assert Buckets(((8, 8),), [0, 0, 0], 3, permutation, "data").warning() == ""


@pytest.mark.parametrize("bucket", [(48, 80), (80, 48), (64, 64), (40, 24)])
@pytest.mark.parametrize("size", [(100, 60), (60, 100), (31, 47)])
def test_a_frame_has_the_size_of_its_bucket_and_tells_sdxl_its_crop(bucket, size):
    image = Image.effect_noise(size, 80).convert("RGB")
    pixels, sizes = frame(image, bucket, CropParams(down=0.5, right=0.5))
    assert pixels.shape == (3, *bucket)
    assert sizes.original_size == size[::-1]
    assert sizes.target_size == bucket
    scale = max(bucket[0] / size[1], bucket[1] / size[0])
    cut = [int(size[1] * scale) - bucket[0], int(size[0] * scale) - bucket[1]]
    assert sizes.crop_top_left == tuple(int(0.5 * (max(extra, 0) + 1)) for extra in cut)
    assert min(sizes.crop_top_left) == 0

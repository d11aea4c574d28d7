"""What the vision experiments look at: scenes, real images, corruptions."""

from __future__ import annotations

import pickle
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from entropy_attn.benchmarks import images as sources
from entropy_attn.benchmarks.corruptions import CORRUPTIONS, corrupt, mean_corruption_error
from entropy_attn.benchmarks.scenes import SHAPES, make_scenes

CPU = torch.device("cpu")


# --- scenes -------------------------------------------------------------------------------------


def test_a_scene_depends_on_its_seed_and_its_index_alone():
    whole = make_scenes(24, 3, CPU)
    again = make_scenes(8, 3, CPU, start=16)
    for name in ("images", "labels", "masks"):
        assert torch.equal(getattr(whole, name)[16:], getattr(again, name))
    other = make_scenes(24, 4, CPU)
    assert not torch.equal(whole.images, other.images)
    assert len({image.numpy().tobytes() for image in whole.images}) == 24


def test_labels_are_balanced_and_the_target_is_a_part_of_the_image():
    scenes = make_scenes(400, 0, CPU)
    assert scenes.images.shape == (400, 3, 64, 64)
    assert scenes.images.dtype == torch.uint8
    assert torch.bincount(scenes.labels).tolist() == [50] * len(SHAPES)
    share = scenes.masks.float().mean((1, 2))
    assert share.min() > 0.04
    assert share.max() < 0.21
    # Anywhere: all but the outermost pixels of the corners are covered by one target or another.
    assert scenes.masks.any(0).float().mean() > 0.88
    rows = (scenes.masks.any(2).float() * torch.arange(64)).amax(1)
    assert rows.min() < 32 < rows.max()


def test_the_mask_is_exactly_where_the_checks_are():
    scenes = make_scenes(16, 1, CPU)
    at = torch.arange(64) // 2
    light = ((at + at[:, None]) % 2).bool()
    for image, mask in zip(scenes.images, scenes.masks, strict=True):
        colours = [image[:, mask & part].unique(dim=1) for part in (light, ~light)]
        assert all(colour.shape == (3, 1) for colour in colours)
        same = torch.where(light, *(colour[:, :, None] for colour in colours)) == image
        # Beside the target hardly a pixel of the clutter has its colours.
        assert torch.equal(same.all(0) & mask, mask)
        assert (same.all(0) & ~mask).sum() < 4


def test_shapes_are_told_apart_by_their_masks():
    """Each class has a form of its own: as many pixels of its box as no other, or elsewhere."""
    scenes = make_scenes(8 * 30, 2, CPU)
    found = []
    for label in range(len(SHAPES)):
        forms = []
        for mask in scenes.masks[scenes.labels == label]:
            rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
            box = mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
            forms.append(torch.nn.functional.adaptive_avg_pool2d(box[None].float(), 8))
        found.append(torch.stack(forms).mean(0))
    apart = torch.cdist(*[torch.stack(found).flatten(1)] * 2) + torch.eye(8) * 99
    assert apart.min() > 0.8


# --- real images --------------------------------------------------------------------------------


@pytest.mark.skipif(find_spec("sklearn") is None, reason="scikit-learn is not installed")
def test_digits_are_split_and_scaled():
    parts = [sources.digits(split, 32) for split in sources.SPLITS]
    assert [len(part) for part in parts] == [1437, 360]
    assert parts[0].images.shape == (1437, 3, 32, 32)
    assert parts[0].labels[:10].tolist() == list(range(10))
    with pytest.raises(ValueError, match="split"):
        sources.digits("validation")


def photographs_in(monkeypatch, folder) -> None:
    """Two photographs whose grey values tell where a pixel is from."""
    from PIL import Image

    (folder / "skimage" / "data").mkdir(parents=True)
    (folder / "skimage" / "__init__.py").touch()
    for number, name in enumerate(("one.png", "two.jpg")):
        cells = np.arange(12).reshape(3, 4) * 10 + 120 * number
        Image.fromarray(np.kron(cells, np.ones((96, 96))).astype(np.uint8)).save(
            folder / "skimage" / "data" / name, quality=100
        )
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(__import__("sys").modules, "skimage", raising=False)
    monkeypatch.setattr(sources, "PHOTOGRAPHS", {"skimage/data": ("one.png", "two.jpg")})


def test_crops_of_photographs_never_share_a_pixel_between_the_splits(monkeypatch, tmp_path):
    photographs_in(monkeypatch, tmp_path)
    train, test = (sources.photographs(split, 60) for split in sources.SPLITS)
    assert train.classes == ("one", "two")
    assert train.images.shape == (60, 3, 64, 64)
    assert train.labels.tolist() == [0, 1] * 30
    for part in (train, test):
        # A crop lies within one cell, here of one value.
        assert all(image.float().std() < 1 for image in part.images)
    cells = [{(int(i.float().median()) + 5) // 10 for i in part.images} for part in (train, test)]
    assert not cells[0] & cells[1]
    assert len(cells[0] | cells[1]) >= 20
    assert torch.equal(train.images, sources.photographs("train", 60).images)


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(sources, "find_spec", lambda name: None)
    with pytest.raises(sources.ImagesNotFound, match=r"sklearn.*entropy-attn\[experiments\]"):
        sources.digits("train")


def test_folders_of_images_are_read_as_imagenet_is(tmp_path):
    from PIL import Image

    for name, size, value in (("b", (90, 40), 200), ("a", (30, 60), 50)):
        folder = tmp_path / "val" / name
        folder.mkdir(parents=True)
        Image.new("RGB", size, (value, 0, 0)).save(folder / "x.png")
        (folder / "notes.txt").write_text("no image")
    found = sources.image_folder(tmp_path, "val", 32)
    assert found.images.shape == (2, 3, 32, 32)
    assert found.classes == ("a", "b")
    assert found.images[:, 0].float().mean((1, 2)).tolist() == [50, 200]
    with pytest.raises(sources.ImagesNotFound, match="no folders"):
        sources.image_folder(tmp_path, "train")


def test_cifar_is_read_from_its_pickles(tmp_path):
    data = np.random.default_rng(0).integers(0, 256, (4, 3072), dtype=np.uint8)
    contents = {b"data": data, b"fine_labels": [1, 0, 1, 1]}
    for name, content in (("train", contents), ("meta", {b"fine_label_names": [b"x", b"y"]})):
        (tmp_path / name).write_bytes(pickle.dumps(content, protocol=2))
    found = sources.cifar100(tmp_path, "train")
    assert found.labels.tolist() == [1, 0, 1, 1]
    assert found.classes == ("x", "y")
    assert torch.equal(found.images.flatten(1), torch.from_numpy(data))
    with pytest.raises(sources.ImagesNotFound, match="test is missing"):
        sources.cifar100(tmp_path, "test")


def test_a_pickle_that_is_no_data_set_is_refused(tmp_path):
    (tmp_path / "train").write_bytes(pickle.dumps(print))
    (tmp_path / "meta").write_bytes(pickle.dumps({}))
    with pytest.raises(pickle.UnpicklingError, match="no place"):
        sources.cifar100(tmp_path, "train")


def test_cifar_c_is_read_by_corruption_and_severity(tmp_path):
    labels = np.tile(np.arange(3), 5)
    fog = np.zeros((15, 32, 32, 3), dtype=np.uint8)
    fog += np.repeat(np.arange(5, dtype=np.uint8), 3)[:, None, None, None]
    np.save(tmp_path / "fog.npy", fog)
    with pytest.raises(sources.ImagesNotFound, match=r"labels\.npy"):
        sources.cifar100_c(tmp_path)
    np.save(tmp_path / "labels.npy", labels)
    found = sources.cifar100_c(tmp_path)
    assert list(found) == ["fog"]
    assert [int(part.images.unique()) for part in found["fog"]] == list(range(5))
    assert all(part.labels.tolist() == [0, 1, 2] for part in found["fog"])
    assert found["fog"][0].images.shape == (3, 3, 32, 32)


# --- corruptions --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruptions_grow_with_severity_and_are_repeatable(name):
    pytest.importorskip("kornia")
    images = make_scenes(6, 0, CPU).images
    before = torch.random.get_rng_state()
    found = [corrupt(images, name, severity) for severity in range(1, 6)]
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(found[2], corrupt(images, name, 3))
    assert all(part.shape == images.shape and part.dtype == torch.uint8 for part in found)
    changes = [(part.float() - images.float()).abs().mean().item() for part in found]
    assert changes[0] > 0.5
    assert changes == sorted(changes)


def test_mean_corruption_error_is_the_mean_of_ratios_of_sums():
    errors = {"fog": [0.1, 0.2], "noise": [0.4, 0.4]}
    plain = {"fog": [0.2, 0.4], "noise": [0.3, 0.1]}
    assert mean_corruption_error(errors, plain) == pytest.approx((0.3 / 0.6 + 0.8 / 0.4) / 2)
    assert mean_corruption_error(plain, plain) == 1.0
    # Without an error of the baseline there is no ratio.
    assert mean_corruption_error(errors, plain | {"fog": [0.0, 0.0]}) == pytest.approx(2.0)
    with pytest.raises(ValueError, match="no error"):
        mean_corruption_error(errors, {"fog": [0.0], "noise": [0.0]})
    with pytest.raises(ValueError, match="differ"):
        mean_corruption_error(errors, {"fog": [0.1]})

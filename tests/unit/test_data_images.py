"""Folders of images: classes, crops as a function of seed, epoch and index, and what is refused."""

from __future__ import annotations

import builtins
from pathlib import Path

import numpy as np
import pytest
import torch

from qrecipes.config.run import DataSection, TaskSection
from qrecipes.data import IGNORE, build_data, build_training_data, build_validation_data
from qrecipes.data.images import CROP_AREA, CROP_ASPECT, MEAN, STD, center_crop, random_crop
from qrecipes.errors import ConfigError, DataError

Image = pytest.importorskip("PIL.Image", reason="waits for qrecipes[vision]")
TASK = TaskSection(kind="classification")
COLORS = {"ant": (255, 0, 0), "bee": (0, 255, 0), "cat": (0, 0, 255)}


def write_folder(folder: Path, per_class: int = 4, size: tuple[int, int] = (20, 12)) -> Path:
    """A plain color for each class; the number of the image is a gray square in its corner."""
    for name, color in COLORS.items():
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            image = Image.new("RGB", size, color)
            image.paste((i * 40, i * 40, i * 40), (0, 0, 6, 6))
            image.save(folder / name / f"{i}.png")
    return folder


def section(folder: Path, **kwargs) -> DataSection:
    defaults = {"source": "images", "files": (str(folder),), "image_size": 8, "batch_size": 3}
    return DataSection(**(defaults | kwargs))


def build(data: DataSection, *, seed=0, rank=0, world=1):
    return build_training_data(data, None, task=TASK, seed=seed, rank=rank, world=world)


def refusal(data: DataSection, error: type[Exception] = DataError) -> str:
    with pytest.raises(error) as caught:
        build(data).next_batch()
    return str(caught.value)


def test_classes_are_the_sorted_folders_and_colors_are_normalized(tmp_path):
    data = build(section(write_folder(tmp_path), shuffle=False, augment=False))
    assert data.num_sequences == 12
    batches = [data.next_batch() for _ in range(4)]
    assert torch.cat([batch.targets for batch in batches]).tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert data.max_token() == 2
    assert data.describe() == f"12 images in 3 classes from {tmp_path}"
    image = batches[0].inputs[0]
    assert (image.shape, image.dtype) == ((3, 8, 8), torch.float32)
    red = (torch.tensor([1.0, 0.0, 0.0]) - torch.tensor(MEAN)) / torch.tensor(STD)
    torch.testing.assert_close(image[:, -1, -1], red)


def test_centered_crop_is_that_of_torchvision(tmp_path):
    """Resize the shorter side to 256/224 of the size, then cut out the middle."""
    transforms = pytest.importorskip("torchvision.transforms.v2", reason="waits for qrecipes[vision]")
    # 144 x 96 pixels shrink to whole numbers, 96 x 64, so that torchvision need not round the size
    pixels = np.random.default_rng(0).integers(256, size=(96, 144, 3), dtype=np.uint8)
    (tmp_path / "a").mkdir()
    Image.fromarray(pixels).save(tmp_path / "a" / "0.png")
    ours = build(section(tmp_path, image_size=56, batch_size=1, augment=False)).next_batch().inputs[0]
    theirs = transforms.Compose(
        [
            transforms.PILToTensor(),
            transforms.Resize(64, interpolation=transforms.InterpolationMode.BICUBIC, antialias=True),
            transforms.CenterCrop(56),
            transforms.ToDtype(torch.float32, scale=True),
            transforms.Normalize(MEAN, STD),
        ]
    )(Image.open(tmp_path / "a" / "0.png"))
    # one gray level of 255, should a resize round otherwise
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1.01 / 255 / min(STD))


@pytest.mark.parametrize(("width", "height"), [(200, 100), (31, 77), (5, 500)])
def test_random_crops_stay_inside_and_vary(width, height):
    generator = np.random.default_rng(0)
    boxes = [random_crop(width, height, generator) for _ in range(200)]
    for left, top, right, bottom in boxes:
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        assert CROP_ASPECT[0] * (1 - 1e-9) <= (right - left) / (bottom - top) <= CROP_ASPECT[1] * (1 + 1e-9)
        assert (right - left) * (bottom - top) <= width * height * CROP_AREA[1]
    # nothing of 8 % of the area fits into the narrow image, so it always gets the largest centered crop
    num_boxes = len(set(boxes))
    assert num_boxes == 1 if height == 500 else num_boxes > 150


def test_centered_crop_is_square_and_centered():
    assert center_crop(200, 160) == (30, 10, 170, 150)


def test_augmentation_differs_by_epoch_and_seed_and_repeats(tmp_path):
    data = section(write_folder(tmp_path), shuffle=False, batch_size=12)
    first = build(data)
    epochs = [first.next_batch().inputs for _ in range(2)]
    again = build(data)
    assert all(torch.equal(again.next_batch().inputs, epoch) for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(build(data, seed=1).next_batch().inputs, epochs[0])
    plain = build(section(tmp_path, shuffle=False, batch_size=12, augment=False))
    assert torch.equal(plain.next_batch().inputs, plain.next_batch().inputs)


def test_half_of_the_images_are_flipped(tmp_path):
    (tmp_path / "a").mkdir()
    ramp = np.tile(np.linspace(0, 255, 64, dtype=np.uint8)[None, :, None], (64, 1, 3))
    Image.fromarray(ramp).save(tmp_path / "a" / "0.png")
    batch = build(section(tmp_path, batch_size=200)).next_batch().inputs
    flipped = (batch[:, 0, :, 0] > batch[:, 0, :, -1]).all(-1).float().mean()
    assert 0.35 < flipped < 0.65  # 4 standard deviations of 200 fair draws


def test_resume_is_exact_mid_epoch_in_another_world(tmp_path):
    data = section(write_folder(tmp_path), batch_size=2)
    unbroken = build(data)
    for _ in range(5):
        unbroken.next_batch()
    state = unbroken.state_dict()
    expected = [unbroken.next_batch() for _ in range(4)]
    parts = [build(data, rank=rank, world=2) for rank in range(2)]
    for part in parts:
        part.load_state_dict(state)
    resumed = [part.next_batch() for _ in range(2) for part in parts]
    for one, other in zip(expected, resumed, strict=True):
        assert torch.equal(one.inputs, other.inputs)
        assert torch.equal(one.targets, other.targets)


def test_held_out_fraction_is_the_end_of_each_class(tmp_path):
    folder = write_folder(tmp_path)
    data = section(folder, validation_fraction=0.25, batch_size=2, augment=False, shuffle=False)
    training, held_out = build_data(data, None, task=TASK, seed=0, rank=0, world=1)
    batches = list(held_out)
    assert torch.cat([batch.targets for batch in batches]).tolist() == [0, 1, 2, IGNORE]
    assert not batches[-1].inputs[-1].any()
    assert training.num_sequences == 9
    trained = torch.cat([training.next_batch().inputs for _ in range(5)])
    for image in torch.cat([batch.inputs for batch in batches])[:3]:
        assert not any(torch.equal(image, other) for other in trained)


def test_held_out_folder_shares_the_numbers_of_the_classes(tmp_path):
    write_folder(tmp_path / "train")
    write_folder(tmp_path / "held", per_class=1)
    for name in ("ant", "cat"):
        (tmp_path / "held" / name / "0.png").unlink()
        (tmp_path / "held" / name).rmdir()
    data = section(tmp_path / "train", validation_files=(str(tmp_path / "held"),))
    held_out = build_validation_data(data, None, task=TASK, seed=0, rank=0, world=1)
    assert [batch.targets.tolist() for batch in held_out] == [[1, IGNORE, IGNORE]]
    (tmp_path / "held" / "bee").rename(tmp_path / "held" / "dog")
    with pytest.raises(DataError, match="class 'dog' is not among the 3 training classes"):
        build_validation_data(data, None, task=TASK, seed=0, rank=0, world=1)


def test_other_modes_and_hidden_files_are_taken_in_stride(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    Image.new("L", (9, 9), 128).save(folder / "gray.png")
    Image.new("RGBA", (9, 9), (1, 2, 3, 4)).save(folder / "alpha.PNG")
    Image.new("P", (9, 9)).save(folder / "palette.gif")
    (folder / ".DS_Store").write_bytes(b"x")
    (folder / "notes.txt").write_text("no image")
    (tmp_path / ".cache").mkdir()
    data = build(section(tmp_path))
    assert data.num_sequences == 3
    assert data.next_batch().inputs.shape == (3, 3, 8, 8)


def test_folder_without_classes_is_refused(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "0.png")
    text = refusal(section(tmp_path))
    assert f"data.files: {tmp_path} has no classes; put the images into one sub-folder" in text
    assert "is no folder; images lie in one folder for each class" in refusal(section(tmp_path / "nowhere"))


def test_empty_class_is_refused(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "dog").mkdir()
    assert f"{tmp_path / 'dog'} holds no images; expected .jpg" in refusal(section(tmp_path))


@pytest.mark.parametrize("damage", ["cut", "text"])
def test_damaged_image_is_named(tmp_path, damage):
    write_folder(tmp_path, per_class=1, size=(200, 200))
    path = tmp_path / "bee" / "0.png"
    path.write_bytes(path.read_bytes()[:-60] if damage == "cut" else b"no image")
    assert f"{path}: not an image that can be read" in refusal(section(tmp_path))


def test_too_few_to_hold_out_is_refused(tmp_path):
    assert "data.validation_fraction: 0.05 of 4 to 4 images a class" in refusal(
        section(write_folder(tmp_path), validation_fraction=0.05)
    )


def test_task_must_be_classification(tmp_path):
    with pytest.raises(ConfigError, match=r'set task\.kind = "classification"'):
        build_training_data(section(tmp_path), None, task=TaskSection(), seed=0, rank=0, world=1)


def test_missing_extra_is_named(tmp_path, monkeypatch):
    real = builtins.__import__

    def without_pillow(name, *args, **kwargs):
        if name.split(".")[0] == "PIL":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    write_folder(tmp_path)
    monkeypatch.setattr(builtins, "__import__", without_pillow)
    assert "install qrecipes[vision]" in refusal(section(tmp_path), ConfigError)

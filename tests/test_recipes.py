"""What a run chooses by itself, and folders of pictures as people have them."""

import argparse
import shutil
from pathlib import Path

import pytest
import timm
from PIL import Image
from runs import MODEL, main, refused, rows, write_images

from mrconvnext.training.arguments import parse_args
from mrconvnext.training.datasets import Data, open_data
from mrconvnext.training.recipes import choices, settle
from mrconvnext.training.samples import as_rgb


class Pictures:
    """As many images of one size as one likes."""

    def __init__(self, count: int, side: int = 100) -> None:
        self.count, self.side = count, side

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.new("RGB", (self.side, 2 * self.side)), 0


def settled(words: str, count: int, caplog: pytest.LogCaptureFixture) -> argparse.Namespace:
    args = parse_args(["--output", "x", *words.split()])
    with caplog.at_level("INFO"):
        settle(args, Data(Pictures(count), Pictures(10), 2))
    return args


@pytest.mark.parametrize(
    ("words", "count", "recipe"),
    [
        ("", 600, "small"),
        ("", 99_999, "small"),
        ("", 1_281_167, "imagenet"),
        ("--pretrained", 600, "finetune"),
        ("--finetune best.safetensors", 1_281_167, "finetune"),
        ("--recipe small --pretrained", 600, "small"),
    ],
)
def test_the_recipe_follows_weights_and_images(words: str, count: int, recipe: str, caplog) -> None:
    args = settled(words, count, caplog)
    assert args.recipe == recipe and f"recipe {recipe} for {count} images" in caplog.text
    assert args.global_batch <= max(4, count // 20) and not any(r.levelname == "WARNING" for r in caplog.records)
    steps = args.epochs * (count // args.global_batch)
    assert (
        steps >= 500 and args.warmup_epochs < args.epochs / 10 and args.img_size == (128 if recipe == "small" else None)
    )
    assert 1 / (1 - args.model_ema_decay) < steps / 4


@pytest.mark.parametrize("name", ["mrconvnextv2_atto", "convnextv2_atto", "resnet18"])
def test_models_without_layer_scales_get_none(name: str, caplog) -> None:
    assert settled(f"--recipe small --model {name}", 600, caplog).ls_init is None
    settled(f"--recipe imagenet --model {name} --global-batch 64 --lr 1 --no-lr-scaling --warmup-epochs 1", 600, caplog)
    assert "--ls-init" not in caplog.text


def test_what_is_given_stays(caplog) -> None:
    args = settled("--recipe small --epochs 7 --aa rand-m9 --img-size 96 --lr 4e-3", 600, caplog)
    assert (args.epochs, args.aa, args.img_size, args.lr, args.no_lr_scaling) == (7, "rand-m9", 96, 4e-3, True)
    assert "--epochs" not in caplog.text and "--global-batch 16" in caplog.text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--global-batch 64 --epochs 5", "--warmup-epochs 20 is not less than --epochs 5"),
        ("--global-batch 64", "give --ls-init 0.1"),
        ("--global-batch 16 --epochs 20 --ls-init 0.1 --warmup-epochs 1", "hardly move weights that are random"),
    ],
)
def test_a_schedule_that_can_not_train_is_warned_of(words: str, said: str, caplog) -> None:
    settled(f"--recipe imagenet {words}", 600, caplog)
    assert said in "\n".join(record.message for record in caplog.records if record.levelname == "WARNING")


def test_few_images_are_told_what_to_do(images: Path, tmp_path: Path, capsys) -> None:
    error = refused(["--recipe", "imagenet", "--data-dir", images, "--output", tmp_path / "run"], capsys)
    assert "--global-batch 4096 is more than the 120 training images" in error and "--recipe small" in error


def test_a_misspelt_model_is_told_before_anything_else(images: Path, tmp_path: Path, capsys) -> None:
    assert main("--model", "mrconvnext_ato", "--data-dir", images, "--output", tmp_path / "run") == 2
    said = capsys.readouterr()
    assert said.out == "" and "mrconvnext_ato is not a model" in said.err and "close are" in said.err


def test_choices_are_the_same_for_any_number_of_images() -> None:
    for recipe in ("small", "finetune"):
        for count in (1, 2, 3, 10, 1000, 50_000):
            own = choices(recipe, Data(Pictures(count), Pictures(1), 2), {})
            assert own["global_batch"] in (4, 8, 16, 32, 64, 128, 256) and own["epochs"] >= 5
            assert 0 < own["model_ema_decay"] < 1


# Folders


@pytest.fixture
def unsplit(tmp_path: Path) -> Path:
    """A folder of class folders without splits."""
    write_images(tmp_path / "images", train=7, validation=1, classes=3)
    return Path(shutil.move(tmp_path / "images" / "train", tmp_path / "unsplit"))


def test_a_folder_without_splits_is_split(unsplit: Path, caplog) -> None:
    for file in sorted((unsplit / "2").iterdir())[1:]:
        file.unlink()

    def names(seed: int) -> list[set[str]]:
        with caplog.at_level("INFO"):
            data = open_data(parse_args(["--data-dir", str(unsplit), "--output", "x", "--seed", str(seed)]))
        assert data.names == ["0", "1", "2"]
        return [{own.filename(i) for i in range(len(own))} for own in (data.train, data.validation)]

    train, validation = names(1)
    assert not train & validation and len(train | validation) == 15 and len(validation) == 4
    assert {name.partition("/")[0] for name in train} == {"0", "1", "2"}  # of one image nothing is held out
    assert names(1) == [train, validation] and names(2) != [train, validation]
    assert "a fifth of each class is held out, drawn by --seed 1" in caplog.text


def leave_one_class(folder: Path) -> None:
    (folder / "0").rename(folder.with_name("left"))
    shutil.rmtree(folder)
    folder.with_name("left").rename(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: shutil.rmtree(folder), "must be a folder of images"),
        (lambda folder: (shutil.rmtree(folder), folder.write_text("a file")), "must be a folder of images"),
        (lambda folder: (shutil.rmtree(folder), folder.mkdir()), "no "),
        (lambda folder: (folder / "validation").mkdir(), "the split 'train'"),
        (leave_one_class, "holds images, but no folders of classes"),
    ],
)
def test_what_is_no_folder_of_pictures(change, said: str, unsplit: Path, tmp_path: Path, capsys) -> None:
    change(unsplit)
    assert said in refused([*MODEL, "--data-dir", unsplit, "--output", tmp_path / "run"], capsys)
    assert not (tmp_path / "run").exists()


def test_pictures_of_all_kinds(tmp_path: Path) -> None:
    image = Image.new("RGB", (4, 8), "red")
    exif = image.getexif()
    exif[0x0112] = 6  # as of a camera that was held upright
    image.save(tmp_path / "a.jpg", exif=exif)
    with Image.open(tmp_path / "a.jpg") as rotated:
        assert as_rgb(rotated).size == (8, 4)
    clear = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    palette = clear.convert("P")
    palette.info["transparency"] = palette.getpixel((0, 0))
    for own in (clear, Image.new("LA", (2, 2), (0, 0)), palette):
        assert as_rgb(own).getpixel((0, 0)) == (255, 255, 255)
    assert as_rgb(Image.new("L", (2, 2), 7)).getpixel((0, 0)) == (7, 7, 7)
    assert as_rgb(Image.new("CMYK", (2, 2))).mode == as_rgb(Image.new("1", (2, 2))).mode == "RGB"


@pytest.mark.slow
def test_the_card_and_configuration_of_a_run_are_true(unsplit: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    arguments = [*MODEL, "--data-dir", unsplit, "--global-batch", 4, "--epochs", 1]
    assert main(*arguments, "--crop-pct", 1, "--output", first) == 0
    card = (first / "fused" / "README.md").read_text()
    assert f'create_model("local-dir:{first}/fused"' in card
    assert "**Classes:** 3: 0, 1, 2" in card
    assert "**Licence:** not stated" in card and "unsplit" in card and "**Started from:** random weights" in card
    cfg = timm.create_model(f"local-dir:{first}/fused", pretrained=True).pretrained_cfg
    assert (cfg["crop_pct"], cfg["input_size"], cfg.get("test_input_size")) == (1.0, (3, 32, 32), None)
    assert not cfg.get("tag") and not cfg.get("license")
    more = ["--finetune", first / "best.safetensors", "--license", "mit"]
    assert main(*arguments, *more, "--output", second) == 0
    card = (second / "trained" / "README.md").read_text()
    assert "license: mit" in card and "**Started from:** best.safetensors" in card


@pytest.mark.slow
def test_settled_arguments_are_those_of_a_resumed_run(unsplit: Path, tmp_path: Path) -> None:
    words = ["--data-dir", unsplit, "--model", "mrconvnext_atto", *MODEL[2:5], "--output", tmp_path / "run"]
    words += ["--device", "cpu", "--workers", 0, "--epochs", 1]
    assert main(*words) == 0
    (unsplit / "0" / "6.jpg").unlink()  # one image less, by which the recipe would choose otherwise
    assert main("--output", tmp_path / "run", "--resume", "auto", "--epochs", 2) == 0
    assert len(rows(tmp_path / "run")) == 2

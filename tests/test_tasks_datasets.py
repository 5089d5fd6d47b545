"""The readers, on small files of the published forms, and batches."""

import gzip
import pickle
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from mrconvnext.tasks import TASKS, DataError, collate, listops, open_task, pathfinder, signals, texts

RNG = np.random.default_rng(0)


def parts_of(name: str, folder: Path, **options) -> list[list]:
    """Returns all samples of the three parts, and checks them against what the task says of itself."""
    task = TASKS[name]
    parts = [[data[i] for i in range(len(data))] for data in open_task(name, folder, **options)]
    for sequence, label in sum(parts, []):
        assert type(label) is int and 0 <= label < task.classes
        for own in sequence if task.pairs else (sequence,):
            if task.vocabulary:
                assert own.dtype == torch.int64 and own.dim() == 1 and 0 < int(own.max()) < task.vocabulary
            else:
                assert own.dtype == torch.float32 and own.shape[1:] == (task.channels,)
            assert 1 <= len(own) <= task.length
    return parts


# ListOps


def write_listops(folder: Path, line: str = "( ( ( [MAX 3 ) ( ( ( [SM 4 ) 5 ) ] ) ) ] )\t9") -> Path:
    for name in listops.FILES.values():
        (folder / name).write_bytes(f"Source\tTarget\r\n{line}\r\n".encode())
    return folder


def test_listops_tokens(tmp_path):
    train, validation, test = parts_of("listops", write_listops(tmp_path))
    sequence, label = train[0]
    names = ["<pad>", "<unk>", "<eos>", *texts.LISTOPS_TOKENS]
    assert len(names) == TASKS["listops"].vocabulary
    assert [names[i] for i in sequence] == ["[MAX", "3", "[SM", "4", "5", "]", "]", "<eos>"]
    assert label == 9 and len(train) == len(validation) == len(test) == 1


def test_listops_reads_what_is_generated(tmp_path):
    listops.generate(tmp_path, {"train": 9, "validation": 4, "test": 3}, seed=2)
    parts = parts_of("listops", tmp_path)
    assert [len(part) for part in parts] == [9, 4, 3]
    assert [label for _, label in sum(parts, [])] == [value for _, value in listops.examples(2, 0)[:16]]
    assert all(500 < len(sequence) - 1 < 2000 for sequence, _ in sum(parts, []))


def test_listops_cuts_what_is_too_long(tmp_path):
    line = "[SM " + "1 " * 3000 + "]\t0"
    (sequence, _), *_ = parts_of("listops", write_listops(tmp_path, line))[0]
    assert len(sequence) == 2048 and sequence[-1] == texts.END


@pytest.mark.parametrize("line", ["[MAX 3 4 ]", "[MAX 3 4 ]\t12", "[MAX 3 x ]\t4", "\t4", "[MAX 3 ]\ttwo"])
def test_listops_damaged(tmp_path, line):
    with pytest.raises(DataError, match=r"basic_train.tsv is damaged \(line 2 .* python -m mrconvnext.tasks listops"):
        open_task("listops", write_listops(tmp_path, line))


def test_listops_without_expressions(tmp_path):
    for content in ("Source\tTarget\n", "something else\n", ""):
        write_listops(tmp_path)
        (tmp_path / "basic_train.tsv").write_text(content)
        with pytest.raises(DataError, match="basic_train.tsv is damaged"):
            open_task("listops", tmp_path)


# Text


def write_reviews(folder: Path, count: int = 10) -> Path:
    for part in ("train", "test"):
        for name, text in (("neg", "bad bé"), ("pos", "good ")):
            room = folder / "aclImdb" / part / name
            room.mkdir(parents=True)
            for i in range(count):
                (room / f"{i}_7.txt").write_text(text * (1 + i % 2), encoding="utf-8")
    return folder


def test_text_numbers_characters_by_frequency(tmp_path):
    train, validation, test = parts_of("text", write_reviews(tmp_path, count=20))
    assert (len(train), len(validation), len(test)) == (36, 4, 40)
    # In 20 and 30 copies: b 60, o 60, d 60, space 60, a 30, e with an accent 30, g 30.
    names = ["<pad>", "<unk>", "<eos>", " ", "b", "d", "o", "a", "g", "é"]
    decoded = {"".join(names[i] for i in sequence): label for sequence, label in test}
    assert decoded == {"bad bé<eos>": 0, "bad bébad bé<eos>": 0, "good <eos>": 1, "good good <eos>": 1}


def test_text_rare_characters_are_unknown(tmp_path):
    (write_reviews(tmp_path) / "aclImdb" / "test" / "pos" / "0_7.txt").write_text("güte" + "g" * 5000)
    *_, test = parts_of("text", tmp_path)
    sequence = max((sequence for sequence, _ in test), key=len)
    assert len(sequence) == 4096 and sequence[-1] == texts.END
    assert sequence[1] == texts.UNKNOWN and sequence[0] > texts.END


def test_text_damaged(tmp_path):
    (write_reviews(tmp_path) / "aclImdb" / "train" / "neg" / "3_7.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(DataError, match=r"3_7.txt is damaged .*aclImdb_v1.tar.gz"):
        open_task("text", tmp_path)


# Retrieval


def write_pairs(folder: Path, rows: str = '1.0\t7\t8\tabca\t"quoted ""text"" \t"\n0\t1\t2\ta\tb\n') -> Path:
    for name in texts.RETRIEVAL_FILES:
        (folder / name).write_text(rows, encoding="utf-8")
    return folder


def test_retrieval_pairs(tmp_path):
    train, _, test = parts_of("retrieval", write_pairs(tmp_path))
    (one, two), label = train[0]
    assert label == 1 and len(one) == 5 and len(two) == len('quoted "text" \t') + 1
    assert one[0] == one[3] and len(set(one.tolist())) == 4 and one[-1] == two[-1] == texts.END
    (one, two), label = test[1]
    assert label == 0 and len(one) == len(two) == 2


def test_retrieval_cuts_articles(tmp_path):
    (one, two), _ = parts_of("retrieval", write_pairs(tmp_path, f"1\t7\t8\t{'ab' * 200_000}\tc\n"))[0][0]
    assert len(one) == 4000 and one[-1] == texts.END and len(two) == 2


@pytest.mark.parametrize("rows", ["1\t7\t8\tabc\n", "yes\t7\t8\ta\tb\n", "", '1\t7\t8\ta\t"b\0'])
def test_retrieval_damaged(tmp_path, rows):
    try:
        open_task("retrieval", write_pairs(tmp_path, rows))
    except DataError as error:
        assert "new_aan_pairs.train.tsv is damaged" in str(error) and "\n" not in str(error)
    else:
        assert "\0" in rows  # which the csv module refused before Python 3.11


# Images


@pytest.fixture
def cifar(tmp_path, monkeypatch) -> tuple[Path, np.ndarray, list[int]]:
    """Writes CIFAR-10's files with 4 images each, and returns folder, training images (20, 3072) and labels."""
    source = torchvision.datasets.CIFAR10
    room = tmp_path / source.base_folder
    room.mkdir()
    names = [name for name, _ in source.train_list + source.test_list]
    monkeypatch.setattr(source, "train_list", [(name, None) for name in names[:-1]])
    monkeypatch.setattr(source, "test_list", [(names[-1], None)])
    monkeypatch.setattr(source, "meta", {**source.meta, "md5": None})
    images = RNG.integers(256, size=(24, 3072)).astype(np.uint8)
    labels = RNG.integers(10, size=24).tolist()
    for i, name in enumerate(names):
        own = slice(4 * i, 4 * i + 4)
        (room / name).write_bytes(pickle.dumps({"data": images[own], "labels": labels[own]}))
    (room / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(i) for i in range(10)]}))
    return tmp_path, images, labels


def test_scifar_pixels(cifar):
    folder, images, labels = cifar
    train, validation, test = parts_of("scifar", folder)
    assert (len(train), len(validation), len(test)) == (18, 2, 4)
    mean, deviation = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2023, 0.1994, 0.2010])
    for (sequence, label), image, expected in zip(test, images[20:], labels[20:]):
        planes = torch.from_numpy(image).view(3, 1024).T / 255
        torch.testing.assert_close(sequence, (planes - mean) / deviation)
        assert label == expected


def test_held_out_images_are_those_of_seed_42(cifar):
    folder, _, labels = cifar
    order = torch.randperm(20, generator=torch.Generator().manual_seed(42)).tolist()
    train, validation, _ = open_task("scifar", folder)
    assert [label for _, label in (train[i] for i in range(18))] == [labels[i] for i in order[:18]]
    assert [label for _, label in (validation[i] for i in range(2))] == [labels[i] for i in order[18:]]
    other = open_task("scifar", folder, seed=1)[1]
    assert not all(torch.equal(other[i][0], validation[i][0]) for i in range(2))


def test_image_is_gray_as_pillow_makes_it(cifar):
    folder, images, _ = cifar
    *_, test = parts_of("image", folder)
    for (sequence, _), image in zip(test, images[20:]):
        gray = Image.fromarray(image.reshape(3, 32, 32).transpose(1, 2, 0)).convert("L")
        expected = (torch.from_numpy(np.array(gray)).view(-1, 1) / 255 - 122.6 / 255) / (61 / 255)
        torch.testing.assert_close(sequence, expected)


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape) + array.tobytes()


def write_digits(folder: Path, packed: bool) -> dict[str, np.ndarray]:
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for name, count in (("train", 20), ("t10k", 5)):
        arrays[f"{name}-images-idx3-ubyte"] = RNG.integers(256, size=(count, 28, 28)).astype(np.uint8)
        arrays[f"{name}-labels-idx1-ubyte"] = RNG.integers(10, size=count).astype(np.uint8)
    for name, array in arrays.items():
        content = gzip.compress(idx(array)) if packed else idx(array)
        (folder / (f"{name}.gz" if packed else name)).write_bytes(content)
    return arrays


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name, room", [("smnist", "."), ("smnist", "MNIST/raw"), ("fashion", "FashionMNIST/raw")])
def test_digits_wherever_their_files_lie(tmp_path, name, room, packed):
    arrays = write_digits(tmp_path / room, packed)
    train, validation, test = parts_of(name, tmp_path)
    assert (len(train), len(validation), len(test)) == (18, 2, 5)
    for i, (sequence, label) in enumerate(test):
        pixels = torch.from_numpy(arrays["t10k-images-idx3-ubyte"][i]).view(784, 1)
        torch.testing.assert_close(sequence, (pixels / 255 - 0.5) / 0.5)
        assert label == arrays["t10k-labels-idx1-ubyte"][i]


def test_digits_damaged(tmp_path):
    write_digits(tmp_path, packed=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    for content in (whole[:-100], b"nothing", gzip.compress(gzip.decompress(whole)[:-1]), gzip.compress(b"")):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"train-images-idx3-ubyte.gz is damaged \(.*fashion-mnist"):
            open_task("fashion", tmp_path)


def test_pathfinder_reads_what_is_generated(tmp_path):
    pathfinder.generate(tmp_path, 32, {"train": 6, "validation": 3, "test": 2}, seed=1)
    parts = parts_of("pathfinder", tmp_path)
    made = pathfinder.pictures(32, 1, 0)
    assert [len(part) for part in parts] == [6, 3, 2]
    for (sequence, label), image, expected in zip(sum(parts, []), made.images, made.labels):
        torch.testing.assert_close(sequence.view(32, 32), torch.from_numpy(image) / 127.5 - 1)
        assert label == expected
    with pytest.raises(DataError, match=r"train_images.npy is damaged .*--side 128"):
        open_task("pathx", tmp_path)
    (tmp_path / "test_labels.npy").write_bytes(b"nothing")
    with pytest.raises(DataError, match="test_labels.npy is damaged"):
        open_task("pathfinder", tmp_path)


# Speech


def write_recording(path: Path, samples: np.ndarray, rate: int = 16_000, channels: int = 1) -> None:
    path.parent.mkdir(exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())


@pytest.fixture
def speech(tmp_path) -> Path:
    for label, word in enumerate(signals.SPEECH_WORDS):
        for i in range(7):
            samples = np.arange(16_000 if i else 12_000) + label
            write_recording(tmp_path / word / f"{i}.wav", samples)
    write_recording(tmp_path / "_background_noise_" / "rain.wav", np.zeros(99))
    return tmp_path


def test_speech_is_stratified_and_normalised(speech):
    parts = parts_of("speech", speech)
    assert [len(part) for part in parts] == [175, 35, 35]
    assert all(len({label for _, label in part}) == 35 for part in parts)
    assert all(sequence.shape == (16_000, 1) for sequence, _ in sum(parts, []))
    train = torch.stack([sequence for sequence, _ in parts[0]])
    assert abs(train.mean()) < 1e-3 and abs(train.std() - 1) < 1e-3


def test_speech_parts_have_the_published_shares():
    from mrconvnext.tasks.datasets import _stratified

    labels = np.repeat(np.arange(5), 200)
    parts = _stratified(labels, (0.7, 0.85), seed=42)
    assert sorted(np.concatenate(parts)) == list(range(1000))
    for part, count in zip(parts, (140, 30, 30)):
        assert (np.bincount(labels[part]) == count).all()
    assert any((a != b).any() for a, b in zip(parts, _stratified(labels, (0.7, 0.85), seed=1)))


def test_speech_leaves_out_samples(speech):
    for full, half in zip(open_task("speech", speech), open_task("speech", speech, rate=2)):
        assert len(full) == len(half)
        assert torch.equal(full[0][0][::2], half[0][0]) and half[0][0].shape == (8000, 1)


@pytest.mark.parametrize("form", [dict(rate=8000), dict(channels=2), None])
def test_speech_damaged(speech, form):
    path = speech / "zero" / "0.wav"
    path.write_bytes(b"RIFF") if form is None else write_recording(path, np.zeros(16_000), **form)
    with pytest.raises(DataError, match=r"0.wav is damaged \(.+\); get http"):
        for data in open_task("speech", speech):
            list(map(data.__getitem__, range(len(data))))


# All


@pytest.mark.parametrize("name", TASKS)
def test_missing_data_names_folder_and_remedy(tmp_path, name):
    with pytest.raises(DataError) as caught:
        open_task(name, tmp_path / "nowhere")
    message = str(caught.value)
    assert str(tmp_path / "nowhere") in message and "\n" not in message
    assert "http" in message or "python -m mrconvnext.tasks" in message


@pytest.mark.parametrize(
    "name, rate, message", [("iris", 1, "name must be"), ("speech", 0, "rate"), ("image", 2, "rate")]
)
def test_what_is_not_there_is_refused(tmp_path, name, rate, message):
    with pytest.raises(ValueError, match=message):
        open_task(name, tmp_path, rate=rate)


def test_collate_pads_tokens():
    inputs, mask, labels = collate([(torch.tensor([3, 4]), 1), (torch.tensor([5, 6, 7]), 0)])
    assert inputs.tolist() == [[3, 4, 0], [5, 6, 7]] and labels.tolist() == [1, 0]
    assert mask is not None and mask.tolist() == [[True, True, False], [True, True, True]]


def test_collate_pads_numbers():
    inputs, mask, _ = collate([(torch.ones(2, 3), 0), (torch.ones(4, 3), 0)])
    assert inputs.shape == (2, 4, 3) and inputs.sum() == 18
    assert mask is not None and mask.sum(dim=1).tolist() == [2, 4]


def test_collate_without_padding_has_no_mask():
    inputs, mask, _ = collate([(torch.ones(4, 1), 0), (torch.zeros(4, 1), 1)])
    assert inputs.shape == (2, 4, 1) and mask is None


def test_collate_pads_pairs():
    one, two = (torch.tensor([3]), torch.tensor([4, 5])), (torch.tensor([6, 7, 8]), torch.tensor([9]))
    inputs, mask, labels = collate([(one, 1), (two, 0)])
    assert inputs.tolist() == [[[3, 0, 0], [4, 5, 0]], [[6, 7, 8], [9, 0, 0]]] and labels.tolist() == [1, 0]
    assert mask is not None and mask.sum(dim=-1).tolist() == [[1, 2], [3, 1]]
